"""The converter end to end on tiny models, and every kind of bad input and output folder."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from folder_edits import edit_config, edit_tensors
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, make_model
from transformers import AutoModelForCausalLM

from vllm_milo.checkpoint import TENSOR_NAMES, CheckpointError
from vllm_milo.offline import writer
from vllm_milo.offline.cli import main
from vllm_milo.offline.convert import Conversion, convert, excess_kurtosis
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.evaluate import load_model
from vllm_milo.offline.inspect import inspect_checkpoint
from vllm_milo.offline.milo import Recipe
from vllm_milo.offline.ranks import parse_policies
from vllm_milo.offline.reader import ModelReader
from vllm_milo.shards import ShardError, read_tensors
from vllm_milo.validation import quantized_modules, read_format, validate_checkpoint

FAST = Recipe(max_rounds=1)
WEIGHTS = "model.safetensors"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {family: make_model(family, root / family) for family in FAMILIES}


@pytest.fixture
def source(sources: dict[str, Path], tmp_path: Path) -> Path:
    """A Mixtral of its own, to be broken."""
    return Path(shutil.copytree(sources["mixtral"], tmp_path / "source"))


@pytest.fixture(scope="module")
def checkpoint(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    conversion = Conversion(FAST, parse_policies("dense=16,sparse=8"))
    return convert(sources["qwen2_moe"], tmp_path_factory.mktemp("done") / "milo", conversion, progress=False).out


def refused(source: Path, out: Path, message: str, conversion: Conversion | None = None, error=ConversionError) -> None:
    """Assert that a conversion fails with this message and leaves nothing behind."""
    with pytest.raises(error, match=message):
        convert(source, out, conversion or Conversion(FAST), progress=False)
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}.*"))


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
    fused = tmp_path / "fused"
    shutil.copytree(sources[family], fused)
    model = AutoModelForCausalLM.from_pretrained(sources[family], dtype=torch.bfloat16)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    assert any(tensor.dim() == 3 for tensor in state.values())
    save_file(state, fused / WEIGHTS, metadata={"format": "pt"})
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


def test_streaming_loads_one_layer_at_a_time(sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    order = []
    load = ModelReader.load
    monkeypatch.setattr(ModelReader, "load", lambda self, tensor: order.append(tensor) or load(self, tensor))
    convert(sources["olmoe"], tmp_path / "out", Conversion(FAST), progress=False)
    layers = [name.split(".")[2] for name in order if name.startswith("model.layers.")]
    assert layers == sorted(layers)
    assert len(order) == len(set(order))


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


def test_inspect(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(checkpoint), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == inspect_checkpoint(checkpoint)
    modules = quantized_modules(read_tensors(checkpoint))
    written = load_file(checkpoint / "model-00001-of-00001.safetensors")
    quantized = sum(tensor.nbytes for name, tensor in written.items() if name.rpartition(".")[2] in TENSOR_NAMES)
    assert len(modules) == 4 * 2 + 3 + 3 + 6 * 3  # attention, dense FFN, shared expert, experts
    assert report["quantized_bytes"] == quantized
    assert report["bytes"] == sum(tensor.nbytes for tensor in written.values())
    assert report["bits_per_weight"] == pytest.approx(8 * quantized / report["quantized_weights"])
    assert report["ranks"]["attention"] == {"matrices": 8, "mean": 16, "min": 16, "max": 16}
    assert report["ranks"]["routed_expert"]["mean"] == 8
    assert 0 < report["relative_error"]["dense_ffn"]["mean"] < 0.3
    assert main(["inspect", str(checkpoint)]) == 0
    assert "bits a weight" in capsys.readouterr().out


def test_plain_3_bit_is_3_5_bits_a_weight(sources: dict[str, Path], tmp_path: Path):
    out = convert(sources["olmoe"], tmp_path / "out", Conversion(Recipe(method="rtn")), progress=False).out
    assert inspect_checkpoint(out)["bits_per_weight"] == 3.5


def test_kurtosis():
    assert excess_kurtosis(torch.randn(512, 512)) == pytest.approx(0, abs=0.05)
    assert excess_kurtosis(torch.rand(512, 512)) == pytest.approx(-1.2, abs=0.02)
    assert excess_kurtosis(torch.ones(8, 8)) == 0


# --- bad source models


def test_truncated_source(source: Path, tmp_path: Path):
    content = (source / WEIGHTS).read_bytes()
    (source / WEIGHTS).write_bytes(content[:-100])
    refused(source, tmp_path / "out", r"model\.safetensors: truncated: \d+ bytes, but its header", error=ShardError)


def test_source_that_is_no_safetensors(source: Path, tmp_path: Path):
    (source / WEIGHTS).write_bytes(b"\x80\x02}q\x00." * 10)
    refused(source, tmp_path / "out", "truncated or not a safetensors file", error=ShardError)


def test_source_without_weights(source: Path, tmp_path: Path):
    (source / WEIGHTS).rename(source / "pytorch_model.bin")
    refused(source, tmp_path / "out", r"holds no \*\.safetensors file", error=ShardError)


def test_index_names_a_missing_tensor(source: Path, tmp_path: Path):
    index = {"weight_map": dict.fromkeys([*load_file(source / WEIGHTS), "model.layers.9.x.weight"], WEIGHTS)}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(source, tmp_path / "out", r"tensor model\.layers\.9\.x\.weight is missing, but .*index", error=ShardError)


def test_index_names_a_missing_file(source: Path, tmp_path: Path):
    index = {"weight_map": dict.fromkeys(load_file(source / WEIGHTS), "model-00002-of-00002.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(source, tmp_path / "out", r"model-00002-of-00002\.safetensors: no such file", error=ShardError)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (Q_PROJ, r"model\.layers\.0\.self_attn\.q_proj\.weight: missing"),
        ("model.layers.1.input_layernorm.weight", r"model\.layers\.1\.input_layernorm\.weight: missing"),
        (
            "model.layers.1.block_sparse_moe.experts.3.w2.weight",
            "4 experts, but w2 is there for 3; expert 3 is missing",
        ),
        ("model.norm.weight", r"model\.norm\.weight: missing"),
        ("lm_head.weight", r"lm_head\.weight: missing"),
    ],
)
def test_missing_tensor(source: Path, tmp_path: Path, name: str, message: str):
    edit_tensors(source, WEIGHTS, lambda tensors: tensors.pop(name))
    refused(source, tmp_path / "out", message)


def test_missing_layer(source: Path, tmp_path: Path):
    edit_config(source, num_hidden_layers=3)
    refused(source, tmp_path / "out", r"model\.layers\.2: missing")


def test_wrong_expert_shape(source: Path, tmp_path: Path):
    def edit(tensors):
        for layer in range(2):
            name = f"model.layers.{layer}.block_sparse_moe.experts.1.w1.weight"
            tensors[name] = tensors[name][:64].clone()

    edit_tensors(source, WEIGHTS, edit)
    refused(source, tmp_path / "out", r"experts: w1 has experts of different shapes: \[\(64, 128\), \(128, 128\)\]")


@pytest.mark.parametrize("name", ["self_attn.q_proj.weight", "input_layernorm.weight", "block_sparse_moe.gate.weight"])
def test_wrong_shape(source: Path, tmp_path: Path, name: str):
    first, second = (f"model.layers.{layer}.{name}" for layer in range(2))
    edit_tensors(source, WEIGHTS, lambda tensors: tensors.update({second: tensors[second][1:].clone()}))
    message = rf"{second} has shape \[.*\], but {first} has \[.*\]".replace(".weight", r"\.weight")
    refused(source, tmp_path / "out", message)


def test_wrong_dimensions(source: Path, tmp_path: Path):
    edit_tensors(source, WEIGHTS, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ][None].clone()}))
    refused(source, tmp_path / "out", r"q_proj\.weight must have 2 dimensions, found \[1, 256, 128\]")


def test_wrong_dtype(source: Path, tmp_path: Path):
    edit_tensors(source, WEIGHTS, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].to(torch.int8)}))
    refused(source, tmp_path / "out", r"q_proj\.weight is I8; weights must be one of BF16, F16, F32")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [Q_PROJ, "model.embed_tokens.weight", "model.norm.weight"])
def test_not_finite(source: Path, tmp_path: Path, name: str, value: float):
    def edit(tensors):
        tensors[name].view(-1)[5] = value

    edit_tensors(source, WEIGHTS, edit)
    refused(source, tmp_path / "out", rf"tensor {name} holds NaN or Inf")


def test_scale_that_does_not_fit_names_tensor_and_group(source: Path, tmp_path: Path):
    def edit(tensors):
        tensors[Q_PROJ][3, 70] = 1e7

    edit_tensors(source, WEIGHTS, edit)
    refused(source, tmp_path / "out", r"model\.layers\.0\.self_attn\.q_proj: group 1 of row 3 needs scale")


def test_unknown_family(source: Path, tmp_path: Path):
    edit_config(source, model_type="gpt_oss")
    refused(source, tmp_path / "out", "'gpt_oss' is a MoE family that MiLo does not know; known are mixtral, olmoe")


def test_not_a_moe(source: Path, tmp_path: Path):
    edit_config(source, model_type="llama", num_local_experts=None)
    refused(source, tmp_path / "out", "'llama' is not a Mixture-of-Experts model")


def test_no_config(source: Path, tmp_path: Path):
    (source / "config.json").unlink()
    refused(
        source, tmp_path / "out", r"config\.json: no such file; is .* a Hugging Face model folder", error=ShardError
    )


def test_config_that_is_not_json(source: Path, tmp_path: Path):
    (source / "config.json").write_text("{")
    refused(source, tmp_path / "out", r"config\.json: not valid JSON", error=ShardError)


def test_no_folder(tmp_path: Path):
    refused(tmp_path / "nowhere", tmp_path / "out", "nowhere: no such folder; download the model first")


def test_quantized_source(checkpoint: Path, tmp_path: Path):
    refused(checkpoint, tmp_path / "out", r"the model is quantized already \(milo\); convert the original")


def test_group_size_that_does_not_divide(tmp_path: Path):
    source = make_model("qwen2_moe", tmp_path / "source")

    def edit(tensors):
        for name in tensors:
            if ".experts." in name and "down_proj" in name:
                tensors[name] = tensors[name][..., :64].contiguous()

    edit_tensors(source, WEIGHTS, edit)
    message = r"experts\.0\.down_proj: input size 64 is not a multiple of group size 128; use a smaller --group-size"
    refused(source, tmp_path / "out", message, Conversion(Recipe(group_size=128)), CheckpointError)


def test_ignore_that_matches_nothing(source: Path, tmp_path: Path):
    conversion = Conversion(FAST, ignore=["model.layers.0.self_atn.q_proj"])
    refused(source, tmp_path / "out", r"--ignore 'model\.layers\.0\.self_atn\.q_proj' matches no layer", conversion)


def test_ignore_of_a_part_of_a_fused_layer(source: Path, tmp_path: Path):
    conversion = Conversion(FAST, ignore=["model.layers.0.self_attn.q_proj"])
    refused(source, tmp_path / "out", r"q_proj but not .*k_proj: vLLM fuses these layers", conversion)


def test_frequency_without_counts(source: Path, tmp_path: Path):
    conversion = Conversion(FAST, parse_policies("frequency=8"))
    refused(source, tmp_path / "out", "needs --expert-counts FILE.json; make it with `milo stats", conversion)


# --- bad outputs


def test_existing_output_is_kept(source: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("data")
    with pytest.raises(ConversionError, match="exists and is not empty; choose another or pass --overwrite"):
        convert(source, out, Conversion(FAST), progress=False)
    assert (out / "precious.txt").read_text() == "data"


def test_failure_keeps_the_output_that_was_to_be_replaced(source: Path, checkpoint: Path, tmp_path: Path):
    out = Path(shutil.copytree(checkpoint, tmp_path / "out"))
    edit_tensors(source, WEIGHTS, lambda tensors: tensors[Q_PROJ].fill_(float("nan")))
    with pytest.raises(ConversionError, match="NaN"):
        convert(source, out, Conversion(FAST, overwrite=True), progress=False)
    assert validate_checkpoint(out)


def test_overwrite_replaces(source: Path, checkpoint: Path, tmp_path: Path):
    out = Path(shutil.copytree(checkpoint, tmp_path / "out"))
    convert(source, out, Conversion(FAST, overwrite=True), progress=False)
    assert read_format(out)[1]["model_type"] == "mixtral"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_output_under_a_file(source: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match="cannot be written"):
        convert(source, tmp_path / "file" / "out", Conversion(FAST), progress=False)


def test_output_where_nobody_may_write(source: Path):
    with pytest.raises(ConversionError, match=r"/proc/milo/out: cannot be written"):
        convert(source, Path("/proc/milo/out"), Conversion(FAST), progress=False)


def test_full_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def full(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 3:
            Path(path).write_bytes(b"half a shard")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(writer, "save_file", full)
    refused(
        source, tmp_path / "out", "the disk is full .* nothing was left behind", Conversion(FAST, shard_bytes=50_000)
    )
    assert len(calls) == 3


def test_interrupt_leaves_nothing(sources: dict[str, Path], tmp_path: Path):
    """A real SIGINT while layers are being quantized."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", _INTERRUPTED, str(sources["qwen3_moe"]), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 130, done.stderr
    assert "interrupted; nothing was left behind" in done.stderr
    assert not out.exists()
    assert list(tmp_path.iterdir()) == []


_INTERRUPTED = """
import os, signal, sys
from vllm_milo.offline import convert
from vllm_milo.offline.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit "ignore"
real = convert.quantize_matrices
calls = []
def quantize(*arguments):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGINT)
    return real(*arguments)
convert.quantize_matrices = quantize
sys.exit(main(["quantize", sys.argv[1], "-o", sys.argv[2], "--max-rounds", "1", "--quiet", "--device", "cpu"]))
"""
