"""What `milo inspect` says of a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from vllm_milo.checkpoint import TENSOR_NAMES
from vllm_milo.kernels.resident import WIDE_BYTES, resident_bytes
from vllm_milo.names import split_expert_name
from vllm_milo.offline.checkpoint.inspect import inspect_checkpoint
from vllm_milo.offline.cli import main
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.nouns import Recipe
from vllm_milo.offline.served.load import serving_line
from vllm_milo.shards import read_tensors
from vllm_milo.validation import count_experts, matrix_shape, module_rank, quantized_modules, read_format


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
    # all sizes fill tiles; ranks of 8 are held as 16, and U in four bits in place of three
    assert 1.05 < report["resident_bits_per_weight"] / report["bits_per_weight"] < 1.4
    experts = [matrix_shape(found) for name, found in modules.items() if split_expert_name(name)]
    dense = report["quantized_weights"] - sum(n * k for n, k in experts)
    held = WIDE_BYTES * dense + sum(resident_bytes(n, k, 8, 64, 3) for n, k in experts)
    assert report["resident_bits_dense_16bit"] == pytest.approx(8 * held / report["quantized_weights"])
    assert report["ranks"]["attention"] == {"matrices": 8, "mean": 16, "min": 16, "max": 16}
    assert report["ranks"]["routed_expert"]["mean"] == 8
    assert (report["group_size"], report["group_sizes"]) == (64, {"64": 32})
    assert 0 < report["relative_error"]["dense_ffn"]["mean"] < 0.3
    assert main(["inspect", str(checkpoint)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("3-bit, group size 64, compensators in 3 bits\n")
    assert f"all tensors      {report['bytes'] / 2**20:.1f} MiB\n" in said
    assert f"quantized        {quantized / 2**20:.1f} MiB for " in said
    assert f"(codes, scales, zero points and factors), {report['resident_bits_per_weight']:.3f} on a GPU, " in said
    assert f"on a GPU, {report['resident_bits_dense_16bit']:.3f} with dense layers in 16 bits and 8\n" in said
    assert f"serving          {serving_line(report['serving'])}\n" in said


def test_what_a_token_takes(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A half of 6 experts; the other matrices as a whole."""
    said = inspect_checkpoint(checkpoint)["serving"]
    modules = quantized_modules(read_tensors(checkpoint))
    fmt = read_format(checkpoint)[0]
    codes = {name: resident_bytes(*matrix_shape(found), 0, 64, 3) for name, found in modules.items()}
    whole = {
        name: resident_bytes(*matrix_shape(found), module_rank(name, fmt, count_experts(modules)), 64, 3)
        for name, found in modules.items()
    }
    read = {name: 3 / 6 if split_expert_name(name) else 1 for name in modules}
    assert said["code_bytes"] == round(sum(read[name] * size for name, size in codes.items()))
    assert said["factor_bytes"] == round(sum(read[name] * (whole[name] - size) for name, size in codes.items()))
    # QKV and o of two layers, both GEMMs of the dense FFN, of the shared expert and of the routed ones
    assert said["launches"] == 2 * 2 + 2 + 2 + 2
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    config = json.loads((copy / "config.json").read_text())
    del config["num_experts_per_tok"]
    (copy / "config.json").write_text(json.dumps(config))
    assert inspect_checkpoint(copy)["serving"] is None
    assert main(["inspect", str(copy)]) == 0
    assert "serving " not in capsys.readouterr().out


def test_matrices_of_each_group_size_are_counted(odd_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    conversion = Conversion(Recipe("rtn", group_size=128))
    out = convert(odd_model, tmp_path / "out", conversion, progress=False).out
    report = inspect_checkpoint(out)
    # what writes into the hidden size reads the inner sizes of the dense FFN, the shared expert and 6 experts
    assert report["group_sizes"] == {"64": 32 - 8, "128": 8}
    wide = 192 * (256 + 256 + 6 * 128) / report["quantized_weights"]
    assert report["bits_per_weight"] == pytest.approx(3.5 - 0.25 * wide)
    assert main(["inspect", str(out)]) == 0
    assert capsys.readouterr().out.startswith("3-bit, group sizes 64 (24 matrices) and 128 (8 matrices), compensators")


def test_plain_3_bit_is_3_5_bits_a_weight(sources: dict[str, Path], tmp_path: Path):
    out = convert(sources["olmoe"], tmp_path / "out", Conversion(Recipe(method="rtn")), progress=False).out
    report = inspect_checkpoint(out)
    assert report["bits_per_weight"] == report["resident_bits_per_weight"] == 3.5
