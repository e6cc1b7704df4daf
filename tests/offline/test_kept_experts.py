"""Routed experts that ``--ignore`` names stay as the source has them: a layer's all, or none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from refusals import FAST, WEIGHTS, refused
from safetensors.torch import load_file
from tiny_families import make_family
from tiny_models import FAMILIES, VOCABULARY, fuse_experts
from transformers import AutoConfig

from vllm_milo.offline import convert as converter
from vllm_milo.offline.along import layers as along_text
from vllm_milo.offline.checkpoint.inspect import inspect_checkpoint
from vllm_milo.offline.cli import main as milo
from vllm_milo.offline.conversion import Conversion, Text
from vllm_milo.offline.convert import convert
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.evaluation.divergence import divergence, open_streamed
from vllm_milo.offline.evaluation.model import load_model
from vllm_milo.offline.evaluation.verify import verify_checkpoint
from vllm_milo.offline.learn.end_to_end import TuneOptions
from vllm_milo.offline.learn.layer import LearnOptions
from vllm_milo.offline.planning.plan import make_plan
from vllm_milo.offline.ranks.policies import parse_policies
from vllm_milo.offline.source.reader import ModelReader
from vllm_milo.shards import read_tensors
from vllm_milo.validation import kept_experts, quantized_modules, validate_checkpoint

SHARD = "model-00001-of-00001.safetensors"
EVERY_NAME = [r"re:.*layers\.1\..*experts\.\d+\..*"]
"""Names each matrix of the second layer's experts, and not their module."""


def experts_name(family: str, layer: int = 1) -> str:
    """The module of a layer's experts."""
    return f"model.layers.{layer}.{'block_sparse_moe' if family == 'mixtral' else 'mlp'}.experts"


def keeping(ignore: list[str], **options) -> Conversion:
    return Conversion(FAST, parse_policies("dense=8"), ignore=ignore, **options)


@pytest.mark.parametrize("layout", ["each", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_copied_as_they_are(family: str, layout: str, sources: dict[str, Path], tmp_path: Path):
    source, experts = sources[family], experts_name(family)
    if layout == "fused":
        source = fuse_experts(source, tmp_path / "fused")
    if (family, layout) == ("mixtral", "fused"):
        message = r"layers\.1\.block_sparse_moe\.experts\.down_proj: vLLM does not read fused experts of this family"
        refused(source, tmp_path / "out", message, keeping([experts]))
        return
    out = convert(source, tmp_path / "out", keeping([experts]), progress=False).out
    before, after = load_file(source / WEIGHTS), load_file(out / SHARD)
    mine = {name for name in before if name.startswith(f"{experts}.")}
    assert {name for name in after if name.startswith(f"{experts}.")} == mine
    assert len(mine) == (2 if layout == "fused" else 3 * ModelReader(source).family.num_experts(json_of(source)))
    for name in mine:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name], after[name])
    assert validate_checkpoint(out).ignores(experts)
    verdict = verify_checkpoint(out, source)
    assert verdict.good, verdict.problems
    same_weights(out, source, experts)


def json_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def same_weights(out: Path, source: Path, experts: str) -> None:
    """The model that `milo eval` makes of the checkpoint has the source's weights in these experts."""
    quantized, original = load_model(out), load_model(source)
    names = [name for name, _ in original.named_parameters() if f"layers.{experts.split('.')[2]}.mlp.experts" in name]
    assert len(names) == 2
    for name in names:
        assert torch.equal(quantized.get_parameter(name), original.get_parameter(name))


@pytest.mark.parametrize("ignore", [EVERY_NAME, [r"re:.*layers\.1\..*experts"], [r"re:.*layers\.1\..*experts.*"]])
def test_whichever_names_were_given_the_checkpoint_names_the_module(ignore, sources: dict[str, Path], tmp_path: Path):
    out = convert(sources["olmoe"], tmp_path / "out", keeping(ignore), progress=False).out
    fmt = validate_checkpoint(out)
    assert fmt.ignores(experts_name("olmoe"))
    assert not fmt.ignores(experts_name("olmoe", 0))
    assert ("model.layers.1.mlp.experts" in fmt.ignore) is (ignore == EVERY_NAME)
    assert set(kept_experts(read_tensors(out))) == {"model.layers.1.mlp.experts"}


@pytest.mark.parametrize(
    ("ignore", "named"),
    [
        ("model.layers.1.mlp.experts.3.up_proj", r"experts\.3\.up_proj but not model\.layers\.1\.mlp\.experts\.0\."),
        (r"re:.*layers\.1\..*\.down_proj", r"experts\.0\.down_proj but not model\.layers\.1\.mlp\.experts\.0\.gate"),
        (r"re:.*experts\.0\..*", r"layers\.0\.mlp\.experts\.0\.down_proj but not .*layers\.0\.mlp\.experts\.1\."),
    ],
)
@pytest.mark.parametrize("layout", ["each", "fused"])
def test_some_of_them_are_refused(layout: str, ignore: str, named: str, sources: dict[str, Path], tmp_path: Path):
    source = sources["olmoe"] if layout == "each" else fuse_experts(sources["olmoe"], tmp_path / "fused")
    first = named.rpartition(r"layers\.")[2][0]
    todo = rf"kept as a whole; name them all with --ignore 'model\.layers\.{first}\.mlp\.experts', or none of them"
    refused(source, tmp_path / "out", f"--ignore matches .*{named}.*{todo}", keeping([ignore]))


def test_they_count_in_the_plan_and_in_bits(sources: dict[str, Path], tmp_path: Path, capsys):
    source, experts = sources["olmoe"], experts_name("olmoe")
    out = tmp_path / "out"
    plan = make_plan(ModelReader(source), out, keeping([experts]))
    assert plan.kept.experts == [experts]
    assert (len(plan.kept.matrices), plan.kept.weights) == (5 * 3, 5 * 3 * 128 * 128)
    assert plan.kept.bytes == 2 * plan.kept.weights
    command = ["quantize", str(source), "-o", str(out), "--method", "rtn", "--ignore", experts, "--dry-run"]
    assert milo([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["kept"] == {"matrices": 15, "weights": 245760, "bytes": 491520, "experts": [experts]}
    every = said["quantized_weights"] + 245760
    assert said["bits_per_weight"] == pytest.approx(3.5)
    assert said["bits_per_weight_with_kept"] == pytest.approx(8 * (said["quantized_bytes"] + 491520) / every)
    assert milo(command) == 0
    line = "kept             15 matrices as they are (--ignore), all routed experts of 1 layer among them: 0.5 MiB;"
    assert line in capsys.readouterr().out
    assert milo(command[:-1]) == 0
    report = inspect_checkpoint(out)
    for key in ("quantized_weights", "bits_per_weight", "bits_per_weight_with_kept", "quantized_bytes", "bytes"):
        assert report[key] == pytest.approx(said[key])
    assert (report["kept_weights"], report["kept_bytes"]) == (245760, 491520)
    assert "with 245,760 weights of layers that are kept as they were" in (out / "README.md").read_text()


def random_text(tune: TuneOptions | None = None) -> Text:
    windows = torch.randint(0, VOCABULARY, (4, 48), generator=torch.Generator().manual_seed(0))
    return Text("random", windows, LearnOptions(steps=2, batch=2), tune)


@pytest.mark.parametrize("layout", ["each", "fused"])
@pytest.mark.parametrize("tune", [None, TuneOptions(steps=2, batch=2)], ids=["layers", "whole"])
def test_along_a_text(tune: TuneOptions | None, layout: str, sources: dict[str, Path], tmp_path: Path):
    """With measured ranks; layer 0's experts are learned, those of layer 1 stay."""
    source, experts = sources["qwen3_moe"], experts_name("qwen3_moe")
    if layout == "fused":
        source = fuse_experts(source, tmp_path / "fused")
    conversion = Conversion(FAST, budget_bits=3.8, text=random_text(tune), ignore=[experts])
    out = convert(source, tmp_path / "out", conversion, progress=False).out
    modules = quantized_modules(read_tensors(out))
    assert {name.split(".mlp.")[0] for name in modules if ".experts." in name} == {"model.layers.0"}
    verdict = verify_checkpoint(out, source)
    assert verdict.good, verdict.problems
    assert inspect_checkpoint(out)["bits_per_weight"] <= 3.8
    report = json.loads((out / "milo_report.json").read_text())
    assert set(report["layers"]) == {"model.layers.0", "model.layers.1"}
    assert set(report["matrices"]) == set(modules)
    assert not any(name.startswith(experts) for name in report.get("experts_without_tokens", []))


@pytest.mark.parametrize("how", ["plain", "text"])
def test_it_goes_on_to_the_same_bytes(how: str, sources: dict[str, Path], tmp_path: Path, monkeypatch):
    """After an error in the second layer; the first has the kept experts."""
    source, out = fuse_experts(sources["olmoe"], tmp_path / "fused"), tmp_path / "out"
    options = {"text": random_text() if how == "text" else None, "ignore": [experts_name("olmoe", 0)]}
    whole = convert(source, tmp_path / "whole", keeping(**options), progress=False).out
    name, last = ("learn_layer", 2) if how == "text" else ("load_batches", 3)  # of which one is outside the layers
    place = along_text if how == "text" else converter
    real, calls = getattr(place, name), []

    def fails(*arguments, **keywords):
        calls.append(1)
        if len(calls) == last:
            raise RuntimeError("a defect")
        return real(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, fails)
        with pytest.raises(RuntimeError, match="a defect"):
            convert(source, out, keeping(**options), progress=False)
    summary = convert(source, out, keeping(**options, resume=True), progress=False)
    assert summary.warnings[0] == f"{out}: going on after 1 of 2 layers"
    assert (out / SHARD).read_bytes() == (whole / SHARD).read_bytes()


def test_eval_runs_it_beside_the_source(sources: dict[str, Path], tmp_path: Path):
    """With all matrices but attention's kept, the two differ little; with none kept, more."""
    source, found = sources["olmoe"], {}
    windows = random_text().windows
    for name, ignore in (("kept", [r"re:.*\.experts"]), ("none", [])):
        out = convert(source, tmp_path / name, keeping(ignore), progress=False).out
        models = (open_streamed(folder, torch.device("cpu"), torch.float32) for folder in (out, source))
        found[name] = divergence(*models, windows).kl
    assert 0 < found["kept"] < found["none"]


def test_an_ignored_layer_needs_no_counts(sources: dict[str, Path], tmp_path: Path):
    config = AutoConfig.from_pretrained(sources["olmoe"])
    counts = {experts_name("olmoe", 0): [1] * config.num_experts}
    policies = parse_policies("frequency=8")
    conversion = Conversion(FAST, policies, expert_counts=counts)
    with pytest.raises(ConversionError, match=r"need expert counts of model\.layers\.1\.mlp\.experts"):
        make_plan(ModelReader(sources["olmoe"]), tmp_path / "out", conversion)
    conversion = Conversion(FAST, policies, expert_counts=counts, ignore=[experts_name("olmoe")])
    assert make_plan(ModelReader(sources["olmoe"]), tmp_path / "out", conversion).kept.weights


def test_experts_of_any_layout_are_counted(tmp_path: Path):
    """Granite's lie in 3-D tensors whose names end as those of matrices do."""
    source = make_family("granitemoe", tmp_path / "source")
    experts = "model.layers.1.block_sparse_moe.experts"
    out = convert(source, tmp_path / "out", keeping([experts]), progress=False).out
    routed = [matrix for matrix in ModelReader(source).matrices if matrix.experts == experts]
    assert len(routed) > 3
    assert inspect_checkpoint(out)["kept_weights"] == sum(matrix.n * matrix.k for matrix in routed)
