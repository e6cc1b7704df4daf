"""What `milo inspect` says of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from vllm_milo.checkpoint import TENSOR_NAMES
from vllm_milo.offline.checkpoint.inspect import inspect_checkpoint
from vllm_milo.offline.cli import main
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.nouns import Recipe
from vllm_milo.shards import read_tensors
from vllm_milo.validation import quantized_modules


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
    assert report["ranks"]["attention"] == {"matrices": 8, "mean": 16, "min": 16, "max": 16}
    assert report["ranks"]["routed_expert"]["mean"] == 8
    assert (report["group_size"], report["group_sizes"]) == (64, {"64": 32})
    assert 0 < report["relative_error"]["dense_ffn"]["mean"] < 0.3
    assert main(["inspect", str(checkpoint)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("3-bit, group size 64, compensators in 3 bits\n")
    assert f"(codes, scales, zero points and factors), {report['resident_bits_per_weight']:.3f} on a GPU\n" in said


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
