"""`milo import`: other tools' 3-bit checkpoints become MiLo checkpoints with the same codes and the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from folder_edits import edit_format, edit_tensors
from foreign_checkpoints import WEIGHTS, Foreign, compressed, gptq
from safetensors.torch import load_file
from tiny_models import VOCABULARY

from vllm_milo.checkpoint import CheckpointError
from vllm_milo.offline.checkpoint.dequantize import DequantizedTensors
from vllm_milo.offline.cli import main as milo
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.evaluation.model import load_model
from vllm_milo.offline.evaluation.verify import verify_checkpoint
from vllm_milo.offline.importing.importer import import_checkpoint
from vllm_milo.validation import validate_checkpoint

Q_PROJ = "model.layers.0.self_attn.q_proj"


def assert_same(foreign: Foreign, out: Path) -> None:
    """All weights are those that the source stands for, and every other tensor is the source's."""
    fmt = validate_checkpoint(out)
    found = DequantizedTensors(out, fmt, torch.float32)
    assert found.matrices == foreign.weights.keys()
    for module, weights in foreign.weights.items():
        assert torch.equal(found.weight(module), weights), module
    before = load_file(foreign.folder / WEIGHTS)
    others = {name for name in before if name.rpartition(".")[0] not in foreign.weights or name.endswith(".bias")}
    assert found.others == others
    assert all(torch.equal(found.stored(name), before[name]) for name in others)
    assert verify_checkpoint(out).good


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq(family: str, version: int, symmetric: bool, sources: dict[str, Path], tmp_path: Path):
    lowest = {"lowest": 0} if version == 2 else {}
    foreign = gptq(sources[family], tmp_path / "gptq", version, symmetric, **lowest)
    out = import_checkpoint(foreign.folder, tmp_path / "milo").out
    assert_same(foreign, out)
    packed = load_file(out / "model-00001-of-00001.safetensors")[f"{Q_PROJ}.weight_packed"]
    assert torch.equal(packed, load_file(foreign.folder / WEIGHTS)[f"{Q_PROJ}.qweight"].T)


@pytest.mark.parametrize(("group", "stored"), [(32, 32), (128, 128), (-1, 128)])
def test_group_sizes(group: int, stored: int, sources: dict[str, Path], tmp_path: Path):
    """Of rows that share one scale, groups repeat it."""
    foreign = gptq(sources["qwen3_moe"], tmp_path / "gptq", symmetric=False, group=group)
    out = import_checkpoint(foreign.folder, tmp_path / "milo").out
    assert validate_checkpoint(out).group_size == stored
    assert_same(foreign, out)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("family", "group"), [("mixtral", 32), ("qwen3_moe", 64), ("olmoe", 128)])
def test_compressed_tensors(family: str, group: int, symmetric: bool, sources: dict[str, Path], tmp_path: Path):
    foreign = compressed(sources[family], tmp_path / "compressed", symmetric, group)
    assert_same(foreign, import_checkpoint(foreign.folder, tmp_path / "milo").out)


def test_unquantized_layers_are_named_in_ignore(sources: dict[str, Path], tmp_path: Path):
    foreign = gptq(sources["mixtral"], tmp_path / "gptq", kept=("self_attn", "layers.1.block_sparse_moe.experts"))
    out = import_checkpoint(foreign.folder, tmp_path / "milo").out
    assert_same(foreign, out)
    ignored = validate_checkpoint(out).ignore
    assert {Q_PROJ, "model.layers.1.block_sparse_moe.experts"} <= set(ignored)


def test_the_command_and_what_the_model_computes(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    foreign, out = gptq(sources["qwen2_moe"], tmp_path / "gptq"), tmp_path / "milo"
    assert milo(["import", str(foreign.folder), "-o", str(out), "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "matrices of GPTQ, all weights the same, 3.500 bits a weight, no compensators" in said
    assert f"vllm serve {out} --quantization milo" in said
    card = (out / "README.md").read_text()
    assert "milo import gptq -o OUT" in card
    original = load_model(sources["qwen2_moe"])
    for module, weights in foreign.weights.items():
        if ".experts." not in module:
            original.get_submodule(module).weight.data = weights
    for layer in (layer.mlp.experts for layer in original.model.layers if hasattr(layer.mlp, "experts")):
        name = next(name for name, module in original.named_modules() if module is layer)
        for index in range(layer.num_experts):
            gate, up, down = (foreign.weights[f"{name}.{index}.{part}_proj"] for part in ("gate", "up", "down"))
            layer.gate_up_proj.data[index], layer.down_proj.data[index] = torch.cat([gate, up]), down
    tokens = torch.randint(3, VOCABULARY, (1, 16))
    with torch.no_grad():
        assert torch.equal(load_model(out)(tokens).logits, original(tokens).logits)
    assert milo(["import", str(foreign.folder), "-o", str(out)]) == 1
    assert "exists and is not empty" in capsys.readouterr().err
    assert milo(["import", str(foreign.folder), "-o", str(out), "--overwrite", "--quiet"]) == 0


def refused(folder: Path, message: str, error: type[Exception] = ConversionError) -> None:
    out = folder.parent / "milo"
    with pytest.raises(error, match=message):
        import_checkpoint(folder, out)
    assert not out.exists()
    assert not list(folder.parent.glob(".milo.*"))


@pytest.fixture
def folder(sources: dict[str, Path], tmp_path: Path) -> Path:
    """A GPTQ checkpoint, to be broken."""
    return gptq(sources["mixtral"], tmp_path / "gptq").folder


@pytest.fixture
def other(sources: dict[str, Path], tmp_path: Path) -> Path:
    """A checkpoint of compressed-tensors, to be broken."""
    return compressed(sources["mixtral"], tmp_path / "compressed").folder


def change(folder: Path, tensor: str, edit) -> None:
    edit_tensors(folder, WEIGHTS, lambda tensors: tensors.update({tensor: edit(tensors[tensor])}))


def test_activation_order(folder: Path, other: Path):
    change(folder, f"{Q_PROJ}.g_idx", lambda index: index.flip(0))
    refused(folder, rf"{Q_PROJ}\.g_idx: the inputs are not in the order of their groups")
    index = (torch.arange(128) // 64).flip(0).int()
    edit_tensors(other, WEIGHTS, lambda tensors: tensors.update({f"{Q_PROJ}.weight_g_idx": index}))
    refused(other, rf"{Q_PROJ}\.weight_g_idx: the inputs are not in the order of their groups")


def test_zero_points_that_readers_differ_on(sources: dict[str, Path], tmp_path: Path):
    foreign = gptq(sources["mixtral"], tmp_path / "gptq", symmetric=False)
    change(foreign.folder, f"{Q_PROJ}.qzeros", lambda zeros: torch.full_like(zeros, -1))
    refused(foreign.folder, rf"{Q_PROJ}\.qzeros: holds zero points that are 8 to some readers")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda scales: scales * 2.0**-24, "its bfloat16 scales are not all fp16 numbers"),
        (lambda scales: -scales, "holds scales that are not positive and finite"),
        (lambda scales: scales * float("nan"), "holds scales that are not positive and finite"),
    ],
)
def test_scales_that_fp16_does_not_hold(edit, message: str, other: Path):
    change(other, f"{Q_PROJ}.weight_scale", edit)
    refused(other, rf"{Q_PROJ}\.weight_scale: {message}")


def test_other_bits(folder: Path, other: Path):
    edit_format(folder, bits=4)
    refused(folder, r"quantization_config\.bits is 4; `milo import` takes 3")
    edit_format(folder, bits=3)
    change(folder, f"{Q_PROJ}.qzeros", lambda zeros: zeros.new_zeros(zeros.shape[0], 32))
    refused(folder, rf"{Q_PROJ}\.qzeros: expected I32 \[2, 24\] of a 3-bit matrix, found I32 \[2, 32\]")
    edit_format(other, config_groups={"group_0": {"weights": {"num_bits": 4}}})
    refused(other, r"config_groups\.group_0\.weights\.num_bits is 4")


def test_what_the_source_lacks_or_states_otherwise(folder: Path, sources: dict[str, Path], tmp_path: Path):
    refused(
        sources["mixtral"], "has no quantization_config; `milo import` takes 3-bit checkpoints of gptq and compressed"
    )
    edit_format(folder, quant_method="awq")
    refused(folder, r"has quant_method 'awq'; `milo import` takes 3-bit checkpoints of gptq and compressed-tensors")
    edit_format(folder, quant_method="gptq", checkpoint_format="marlin")
    refused(folder, r"checkpoint_format is 'marlin'; `milo import` takes 'gptq' or 'gptq_v2'")
    edit_format(folder, checkpoint_format="gptq")
    edit_tensors(folder, WEIGHTS, lambda tensors: tensors.pop(f"{Q_PROJ}.scales"))
    refused(folder, rf"{Q_PROJ}\.scales: missing; are the model's files complete")


def test_missing_experts(folder: Path):
    def edit(tensors):
        for name in [name for name in tensors if ".layers.0." in name and ".experts.2.w1." in name]:
            del tensors[name]

    edit_tensors(folder, WEIGHTS, edit)
    refused(folder, r"experts\.2\.w1: missing \(4 experts\)", CheckpointError)


def test_parts_of_what_vllm_computes_as_one(sources: dict[str, Path], tmp_path: Path):
    foreign = gptq(sources["mixtral"], tmp_path / "gptq", kept=("v_proj",))
    message = r"self_attn\.k_proj: is quantized, but .*self_attn\.v_proj, which vLLM computes with it, is not"
    refused(foreign.folder, message, CheckpointError)


def test_groups_that_the_format_does_not_have(sources: dict[str, Path], tmp_path: Path):
    foreign = gptq(sources["mixtral"], tmp_path / "gptq", group=16)
    refused(foreign.folder, r"qzeros: has 8 groups along 128 inputs, which MiLo's groups of 32, 64, 128 do not")


def test_a_quantized_router(folder: Path):
    def edit(tensors):
        for leaf in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"model.layers.0.block_sparse_moe.gate.{leaf}"] = tensors[f"{Q_PROJ}.{leaf}"].clone()

    edit_tensors(folder, WEIGHTS, edit)
    refused(folder, r"block_sparse_moe\.gate\.qweight: is quantized, but vLLM takes this layer of mixtral")
