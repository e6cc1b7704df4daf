"""The converter end to end on tiny models, and what a calibration text does for the bundled one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from refusals import FAST, WEIGHTS
from safetensors.torch import load_file
from tiny_models import FAMILIES, VOCABULARY, fuse_experts

from vllm_milo.offline.checkpoint.inspect import inspect_checkpoint
from vllm_milo.offline.checkpoint.report import Report
from vllm_milo.offline.conversion import Conversion, Text
from vllm_milo.offline.convert import convert
from vllm_milo.offline.evaluation.model import load_model
from vllm_milo.offline.learn.layer import LearnOptions
from vllm_milo.offline.nouns import Recipe
from vllm_milo.offline.ranks.budget import stored_bits
from vllm_milo.offline.ranks.policies import parse_policies
from vllm_milo.offline.source import parts
from vllm_milo.offline.source.reader import ModelReader
from vllm_milo.shards import read_tensors
from vllm_milo.validation import matrix_shape, module_rank, quantized_modules, validate_checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, sources: dict[str, Path], tmp_path: Path):
    conversion = Conversion(FAST, parse_policies("uniform=8"))
    summary = convert(sources[family], tmp_path / "out", conversion, progress=False)
    fmt = validate_checkpoint(summary.out)
    modules = quantized_modules(read_tensors(summary.out))
    assert summary.matrices == len(modules)
    names = {name.rpartition(".")[2] for name in modules}
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= names
    assert not any(name.endswith((".gate", "shared_expert_gate", "lm_head")) for name in modules)
    kept = load_file(sources[family] / WEIGHTS)
    written = load_file(summary.out / "model-00001-of-00001.safetensors")
    for name, tensor in kept.items():
        if name.rpartition(".")[0] not in modules:
            assert torch.equal(tensor, written[name]), name
            assert tensor.dim() < 2 or "embed_tokens" in name or fmt.ignores(name.rpartition(".")[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_experts_give_the_same_checkpoint(family: str, sources: dict[str, Path], tmp_path: Path):
    fused = fuse_experts(sources[family], tmp_path / "fused")
    conversion = Conversion(FAST, parse_policies("uniform=8"))
    folders = [
        convert(folder, tmp_path / f"out-{index}", conversion, progress=False).out
        for index, folder in enumerate((sources[family], fused))
    ]
    classic, split = (load_file(folder / "model-00001-of-00001.safetensors") for folder in folders)
    assert classic.keys() == split.keys()
    assert all(torch.equal(classic[name], split[name]) for name in classic)


def test_dequantized_model_is_close_to_the_source(sources: dict[str, Path], tmp_path: Path):
    conversion = Conversion(Recipe(max_rounds=2, factor_bits=8), parse_policies("uniform=64"))
    out = convert(sources["olmoe"], tmp_path / "out", conversion, progress=False).out
    quantized, original = load_model(out), load_model(sources["olmoe"])
    report = json.loads((out / "milo_report.json").read_text())["matrices"]
    name = "model.layers.1.self_attn.o_proj"
    found, expected = (model.get_parameter(f"{name}.weight").detach() for model in (quantized, original))
    assert float((found - expected).norm() / expected.norm()) == pytest.approx(report[name]["error"], rel=1e-3)


def test_shards_are_indexed_and_streamed(sources: dict[str, Path], tmp_path: Path):
    conversion = Conversion(FAST, shard_bytes=60_000)
    out = convert(sources["qwen3_moe"], tmp_path / "out", conversion, progress=False).out
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 3
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for file in files for tensor in load_file(out / file).values()
    )


def test_streaming_reads_each_tensor_once_and_a_batch_ahead(
    sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """What is copied is read when its layer is written, the matrices of the next layer's first batch before that."""
    order, read_part = [], parts.read_part
    for module in ("source.parts", "source.reader", "spread.job"):
        read = f"vllm_milo.offline.{module}.read_part"
        monkeypatch.setattr(read, lambda part, *how: order.append(part.tensor) or read_part(part, *how))
    convert(sources["olmoe"], tmp_path / "out", Conversion(FAST), progress=False)
    assert len(order) == len(set(order))
    quantized = {source.tensor for layer in ModelReader(sources["olmoe"]).layers for source in layer.matrices}
    for kept in (True, False):
        layers = [
            name.split(".")[2] for name in order if name.startswith("model.layers.") and (name in quantized) == kept
        ]
        assert len(set(layers)) == 2
        assert layers == sorted(layers)


ODD_GROUPS = {
    "modules": {
        **{rf"re:.*\.layers\.\d+\.self_attn\.{leaf}_proj": 64 for leaf in "kovq"},
        **{f"model.layers.0.mlp.{leaf}_proj": 64 for leaf in ("gate", "up")},
        **{f"model.layers.1.mlp.shared_expert.{leaf}_proj": 64 for leaf in ("gate", "up")},
    },
    "experts": {"model.layers.1.mlp.experts": {"gate_proj": 64, "up_proj": 64}},
}
"""Of the odd model in groups of 128: one pattern for what is in both layers, names for what is in one of them."""


@pytest.mark.parametrize("along", [False, True], ids=["plain", "text"])
def test_odd_sizes_have_smaller_groups(along: bool, odd_model: Path, tmp_path: Path):
    recipe = Recipe(group_size=128, max_rounds=1)
    conversion = Conversion(recipe, budget_bits=3.8, text=random_text() if along else None)
    out = convert(odd_model, tmp_path / "out", conversion, progress=False).out
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["group_size"] == 128
    assert config["group_sizes"] == ODD_GROUPS
    fmt, tensors = validate_checkpoint(out), read_tensors(out)
    for name, found in quantized_modules(tensors).items():
        k = matrix_shape(found)[1]
        assert fmt.module_group_size(name) == (64 if k == 192 else 128)
        assert found["weight_scale"].shape[1] == k // fmt.module_group_size(name)
    matrices = ModelReader(odd_model).matrices
    ranks = {matrix.name: module_rank(matrix.name, fmt, {"model.layers.1.mlp.experts": 6}) for matrix in matrices}
    assert inspect_checkpoint(out)["bits_per_weight"] == pytest.approx(stored_bits(matrices, ranks, recipe))
    assert 3.7 < stored_bits(matrices, ranks, recipe) <= 3.8
    quantized, original = load_model(out), load_model(odd_model)
    for (name, one), other in zip(quantized.state_dict().items(), original.state_dict().values(), strict=True):
        assert float((one - other).norm() / other.norm()) < 0.25, name


def test_tokenizer_and_other_files_come_along(bundled_model: Path, tmp_path: Path):
    out = convert(bundled_model, tmp_path / "out", Conversion(FAST), progress=False).out
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (bundled_model / name).read_bytes()


def test_seed_makes_it_reproducible(sources: dict[str, Path], tmp_path: Path):
    conversion = Conversion(FAST, parse_policies("uniform=16"))
    folders = [convert(sources["olmoe"], tmp_path / name, conversion, progress=False).out for name in "ab"]
    contents = [(folder / "model-00001-of-00001.safetensors").read_bytes() for folder in folders]
    assert contents[0] == contents[1]


def test_ignored_layers_stay(sources: dict[str, Path], tmp_path: Path):
    conversion = Conversion(FAST, parse_policies("dense=8"), ignore=["re:.*layers\\.0\\.self_attn.*"])
    out = convert(sources["mixtral"], tmp_path / "out", conversion, progress=False).out
    modules = quantized_modules(read_tensors(out))
    assert "model.layers.0.self_attn.q_proj" not in modules
    assert "model.layers.1.self_attn.q_proj" in modules


def random_text(steps: int = 2) -> Text:
    windows = torch.randint(0, VOCABULARY, (4, 48), generator=torch.Generator().manual_seed(0))
    return Text("random", windows, LearnOptions(steps=steps, batch=2))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_along_a_text(family: str, sources: dict[str, Path], tmp_path: Path):
    """With ranks that differ from expert to expert; everything else as without a text."""
    folders = [
        convert(
            sources[family],
            tmp_path / name,
            Conversion(Recipe(max_rounds=1, feedback_rounds=1), parse_policies("dense=16,kurtosis=8"), text=text),
            progress=False,
        ).out
        for name, text in (("plain", None), ("text", random_text()))
    ]
    assert validate_checkpoint(folders[0]).ranks == validate_checkpoint(folders[1]).ranks
    plain, along = (load_file(folder / "model-00001-of-00001.safetensors") for folder in folders)
    assert {n: (t.dtype, t.shape) for n, t in plain.items()} == {n: (t.dtype, t.shape) for n, t in along.items()}
    modules = quantized_modules(plain)
    for name, tensor in plain.items():
        if name.rpartition(".")[0] not in modules:
            assert torch.equal(tensor, along[name]), name
    report = json.loads((folders[1] / "milo_report.json").read_text())
    assert set(report["layers"]) == {"model.layers.0", "model.layers.1"}
    assert set(report["matrices"]) == set(modules)


def test_no_steps_leave_the_solvers_result_to_full_moments(sources: dict[str, Path], tmp_path: Path):
    conversion = Conversion(FAST, parse_policies("uniform=8"), text=random_text(steps=0))
    out = convert(sources["mixtral"], tmp_path / "out", conversion, progress=False).out
    assert "layers" not in json.loads((out / "milo_report.json").read_text())
    assert validate_checkpoint(out).recipe["learn_steps"] == 0


def test_ignored_layers_stay_along_a_text(sources: dict[str, Path], tmp_path: Path):
    ignore = ["re:.*layers\\.0\\..*", "re:.*layers\\.1\\.self_attn.*"]  # layer 0 has no experts
    conversion = Conversion(FAST, parse_policies("dense=8"), ignore=ignore, text=random_text())
    out = convert(sources["qwen2_moe"], tmp_path / "out", conversion, progress=False).out
    modules = quantized_modules(read_tensors(out))
    assert modules
    assert all("layers.1.mlp" in name for name in modules)
    report = json.loads((out / "milo_report.json").read_text())
    assert list(report["layers"]) == ["model.layers.1"]


def test_the_same_seed_gives_the_same_bytes_along_a_text(sources: dict[str, Path], tmp_path: Path):
    contents = []
    for number, seed in enumerate((0, 0, 1)):
        text = random_text(steps=4)
        text = Text(text.name, text.windows, LearnOptions(steps=4, batch=2, seed=seed))
        conversion = Conversion(FAST, budget_bits=3.75, text=text)
        torch.manual_seed(number)  # the state of torch's own generator does not count
        out = convert(sources["qwen2_moe"], tmp_path / str(number), conversion, progress=False).out
        contents.append((out / "model-00001-of-00001.safetensors").read_bytes())
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


@torch.inference_mode()
def divergence(out: Path, original: torch.nn.Module, windows: torch.Tensor) -> float:
    """The KL divergence of a checkpoint's predictions from the original's, nats a token."""
    wanted, found = (model(windows).logits.double().log_softmax(-1) for model in (original, load_model(out)))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def test_a_text_brings_it_nearer_to_the_original_at_equal_bits(
    bundled_model: Path, tmp_path: Path, trained_model, trained_tokens
):
    """At 3.5 bits, what HQQ's groups of 64 take, on windows of the text that it was not calibrated on."""
    half = len(trained_tokens) // 2
    windows, others = (part[: 32 * 256].view(32, 256) for part in (trained_tokens[half:], trained_tokens[:half]))
    joint = Recipe(group_size=128, max_rounds=2, feedback_rounds=1)
    text = Text("valid", windows, LearnOptions(steps=12, batch=8))
    conversions = {
        "hqq": Conversion(Recipe("hqq")),
        "none": Conversion(Recipe(group_size=128, max_rounds=2, base="hqq"), budget_bits=3.5),
        "text": Conversion(joint, budget_bits=3.5, text=text),
    }
    found = {}
    for name, conversion in conversions.items():
        out = convert(bundled_model, tmp_path / name, conversion, progress=False).out
        assert 3.45 < inspect_checkpoint(out)["bits_per_weight"] <= 3.5
        found[name] = divergence(out, trained_model, others[:8])
    assert found["text"] < 0.8 * found["hqq"], found
    assert found["text"] < 0.9 * found["none"], found


def test_experts_that_saw_little_are_named_in_a_warning():
    said = {"before": 1.0, "after": 0.5, "untrained_experts": [f"model.layers.0.mlp.experts.7.{p}" for p in ("a", "b")]}
    report = Report(layers={"model.layers.0": said})
    (warning,) = report.warnings
    assert warning.startswith("1 routed experts saw too little of the calibration text")
    assert "e.g. model.layers.0.mlp.experts.7;" in warning
    assert Report().warnings == []
