"""`milo export`: what compressed-tensors' own code makes of an export are the checkpoint's weights, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_targets
from foreign_checkpoints import compressed, gptq
from safetensors.torch import load_file

from vllm_milo.offline.checkpoint.dequantize import DequantizedTensors
from vllm_milo.offline.cli import main as milo
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.exporting.compressed import describe_format
from vllm_milo.offline.exporting.exporter import _group_sizes, export_checkpoint
from vllm_milo.offline.importing.importer import import_checkpoint
from vllm_milo.offline.nouns import Recipe
from vllm_milo.validation import validate_checkpoint

LEAVES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    assert files
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def convert_plain(source: Path, out: Path, method: str = "rtn", ignore: tuple[str, ...] = (), **recipe) -> Path:
    choices = Recipe(method=method, integer_zeros=True, **recipe)
    return convert(source, out, Conversion(choices, ignore=ignore), progress=False).out


def assert_same(checkpoint: Path, out: Path) -> None:
    """Each matrix by the scheme that config.json gives it, and everything else as it was; no linear layer is missed."""
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    assert quantization.pop("quant_method") == "compressed-tensors"
    config = QuantizationConfig.model_validate(quantization)
    schemes = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
    ours = DequantizedTensors(checkpoint, validate_checkpoint(checkpoint), torch.float32)
    tensors = load_folder(out)
    for module in ours.matrices:
        assert not match_targets(module, torch.nn.Linear(1, 1), config.ignore), module
        scheme = schemes[match_targets(module, torch.nn.Linear(1, 1), schemes)[0]]
        own = {leaf: tensors.pop(f"{module}.{leaf}") for leaf in LEAVES}
        assert own["weight_shape"][1] // own["weight_scale"].shape[1] == scheme.weights.group_size
        expected = ours.weight(module)
        wide = own | {"weight_scale": own["weight_scale"].float()}
        assert torch.equal(PackedQuantizationCompressor.decompress(wide, scheme)["weight"], expected), module
        assert torch.equal(PackedQuantizationCompressor.decompress(own, scheme)["weight"], expected.half()), module
    assert tensors.keys() == ours.others
    for name, tensor in tensors.items():
        assert torch.equal(tensor, ours.stored(name)), name
        linear = name.endswith(".weight") and tensor.ndim == 2 and "embed" not in name
        module = name.removesuffix(".weight")
        assert not linear or match_targets(module, torch.nn.Linear(1, 1), config.ignore), module


@pytest.mark.parametrize("method", ["rtn", "hqq", "mse"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_plain_methods_with_integer_zero_points(family: str, method: str, sources: dict[str, Path], tmp_path: Path):
    checkpoint = convert_plain(sources[family], tmp_path / "milo", method)
    exported = export_checkpoint(checkpoint, tmp_path / "out")
    assert_same(checkpoint, exported.out)
    assert any("scales that bfloat16 rounds" in note for note in exported.notes)


@pytest.mark.parametrize("form", ["gptq", "compressed"])
def test_an_import_comes_back_with_the_same_codes(form: str, sources: dict[str, Path], tmp_path: Path):
    make = {"gptq": gptq, "compressed": compressed}[form]
    foreign = make(sources["qwen2_moe"], tmp_path / "foreign", symmetric=False)
    before = import_checkpoint(foreign.folder, tmp_path / "milo").out
    exported = export_checkpoint(before, tmp_path / "out")
    assert_same(before, exported.out)
    after = load_folder(import_checkpoint(exported.out, tmp_path / "again").out)
    tensors = load_folder(before)
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items())
    stored = load_folder(foreign.folder)
    if form == "compressed":  # the very bytes, but for scales, which were bf16
        written = load_folder(exported.out)
        assert not exported.notes
        for module in foreign.weights:
            for leaf in ("weight_packed", "weight_zero_point", "weight_shape"):
                assert torch.equal(written[f"{module}.{leaf}"], stored[f"{module}.{leaf}"])


def test_kept_layers_and_several_group_sizes(odd_model: Path, tmp_path: Path):
    """A hidden size of 192 takes groups of 64, and 256 takes 128: both are named in config.json."""
    keep = ("re:.*layers\\.1\\.mlp\\.experts\\..*", "re:.*experts.*")
    checkpoint = convert_plain(odd_model, tmp_path / "milo", ignore=keep, group_size=128)
    exported = export_checkpoint(checkpoint, tmp_path / "out")
    assert_same(checkpoint, exported.out)
    groups = json.loads((exported.out / "config.json").read_text())["quantization_config"]["config_groups"]
    assert sorted(group["weights"]["group_size"] for group in groups.values()) == [64, 128]


def test_the_command(sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    checkpoint, out = tmp_path / "milo", tmp_path / "out"
    words = ["quantize", str(sources["mixtral"]), "-o", str(checkpoint), "--method", "hqq", "--quiet"]
    assert milo([*words, "--zero-points", "integer"]) == 0
    export = ["export", str(checkpoint), "-o", str(out), "--format", "compressed-tensors", "--quiet"]
    assert milo(export) == 0
    said = capsys.readouterr()
    assert f"{out}: 32 matrices for compressed-tensors, all weights the same" in said.out
    assert "milo export milo -o OUT --format compressed-tensors" in (out / "README.md").read_text()
    assert milo(export) == 1
    assert f"{out}: exists and is not empty; choose another output" in capsys.readouterr().err
    assert milo(["quantize", str(sources["mixtral"]), "-o", str(tmp_path / "x"), "--zero-points", "integer"]) == 1
    assert "--zero-points integer is for --method rtn, hqq, mse alone" in capsys.readouterr().err


def refused(checkpoint: Path, message: str) -> None:
    out = checkpoint.parent / "refused"
    with pytest.raises(ConversionError, match=message):
        export_checkpoint(checkpoint, out)
    assert not out.exists()
    assert not list(out.parent.glob(".refused.*"))


def test_compensators_are_refused(checkpoint: Path, tmp_path: Path):
    folder = tmp_path / "milo"
    folder.symlink_to(checkpoint)
    refused(folder, r"model\.layers\.0\.\S+ has a compensator of rank \d+, as have (\d+) of \1 matrices")


def test_real_zero_points_are_refused(sources: dict[str, Path], tmp_path: Path):
    conversion = Conversion(Recipe(method="rtn"))
    checkpoint = convert(sources["mixtral"], tmp_path / "milo", conversion, progress=False).out
    refused(checkpoint, r"weight_zero: \d+ of \d+ zero points are no integers from 0 to 7 .*--zero-points integer")


def test_experts_whose_projections_differ_in_group_size_are_refused(tmp_path: Path):
    """The format of MiLo allows it, since vLLM's plugin computes them in two GEMMs."""
    source = make_wide_experts(tmp_path / "source")
    checkpoint = convert_plain(source, tmp_path / "milo", group_size=128)
    refused(checkpoint, r"experts\.0\.\S+: has groups of \d+, but \S+ groups of \d+, .* one size for \S+experts, which")


def make_wide_experts(folder: Path) -> Path:
    from tiny_models import make_model

    return make_model("qwen3_moe", folder, moe_intermediate_size=192)


def test_fused_linear_layers_that_differ_in_group_size_are_refused():
    """No valid checkpoint has them today; a format that allows it must not slip through."""
    fmt = type("Format", (), {"module_group_size": lambda _, name: 32 if name.endswith("v_proj") else 64})()
    modules = {f"model.layers.0.self_attn.{leaf}": {} for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")}
    message = r"v_proj: has groups of 32, but \S+q_proj groups of 64, .* one size for \S+self_attn\.qkv_proj"
    with pytest.raises(ConversionError, match=message):
        _group_sizes(modules, fmt)


def test_the_usual_group_size_is_that_of_all_linear_layers():
    found = describe_format({"a": 64, "b": 128, "c": 128, "re:d\\..*": 64, "e": 128}, ["lm_head"])
    assert [group["targets"] for group in found["config_groups"].values()] == [["a", "re:d\\..*"], ["Linear"]]
