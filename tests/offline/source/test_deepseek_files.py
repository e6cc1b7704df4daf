"""DeepSeek-V4's own files, FP8 with scales that are powers of two and experts in FP4: values, checkpoints, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_edits import edit_config, edit_tensors
from quantized_sources import WEIGHTS, Tensors, Written, content, e2m1, write_own
from refusals import FAST, refused
from safetensors.torch import load_file
from tiny_families import make_family

from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.ranks.policies import parse_policies
from vllm_milo.offline.source.formats.scheme import Scheme
from vllm_milo.offline.source.formats.settings import find_schemes
from vllm_milo.offline.source.formats.table import OWN_FP4, OWN_FP8
from vllm_milo.offline.source.reader import ModelReader

FP4 = Scheme(OWN_FP4, (1, 32), bits=4)
FP8 = Scheme(OWN_FP8, (128, 128))
FORMATS = {
    "fp4": "FP4 e2m1 (DeepSeek-V4), a scale for 32 weights of a row; "
    "FP8 e4m3 (DeepSeek-V4), a scale for 128x128 weights",
    "fp8": "FP8 e4m3 (DeepSeek-V4), a scale for 128x128 weights",
}
EXPERT = "layers.1.ffn.experts.2.w1"
WQ_B = "layers.1.attn.wq_b"
OWN = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}


def in_float32(tensors: Tensors) -> None:
    """Give a model the float32 tensors that its makers have, and a layer that predicts further tokens."""
    further = {name: tensor for name, tensor in tensors.items() if name.startswith("layers.2.")}
    tensors |= {name.replace("layers.2", "mtp.0"): tensor.clone() for name, tensor in further.items()}
    tensors |= {f"mtp.0.{part}_proj.weight": torch.randn(128, 128).bfloat16() for part in "eh"}
    tensors |= {f"mtp.0.{part}norm.weight": torch.ones(128).bfloat16() for part in "eh"}
    of_floats = ("attn_sink", "gate.bias", "compressor.ape")
    for name in [name for name in tensors if "hc_" in name or name.endswith(of_floats)]:
        tensors[name] = tensors[name].float()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_family("deepseek_v4", tmp_path_factory.mktemp("plain") / "model")
    edit_tensors(folder, WEIGHTS, in_float32)
    return folder


def test_fp4_by_definition():
    """Each of 16 codes in both halves of a byte with each exponent, the least, which is subnormal, among them."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(255, 1, 1)  # 16 groups of 32
    exponents = torch.arange(255, dtype=torch.uint8)[:, None].repeat(1, 16)
    tensors = {"weight": codes.flatten(1).view(torch.int8), "scale": exponents}
    values = OWN_FP4.dequantize(tensors, FP4)
    pairs = torch.tensor([[e2m1(byte & 15), e2m1(byte >> 4)] for byte in range(256)], dtype=torch.float64).flatten()
    powers = 2.0 ** (torch.arange(255, dtype=torch.float64) - 127)
    assert torch.equal(values, (powers[:, None] * pairs).float())  # of which 6 * 2**127 is infinite in float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_as_transformers_reads_them(dtype: torch.dtype):
    """Both formats, with scales of all sizes that bfloat16 has room for."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    reference = Fp8Dequantize(None)._dequantize_one
    exponents = torch.randint(0, 246, (256, 12), dtype=torch.uint8)
    exponents[0, :4] = torch.tensor([0, 1, 245, 127], dtype=torch.uint8)
    packed = torch.randint(-128, 128, (256, 192), dtype=torch.int8)
    codes = torch.randint(0, 127, (256, 384), dtype=torch.uint8).view(torch.float8_e4m3fn)
    for scheme, weight, scale in ((FP4, packed, exponents), (FP8, codes, exponents[::128, :3].contiguous())):
        found = scheme.format.dequantize({"weight": weight, "scale": scale}, scheme).to(dtype)
        assert torch.equal(found, reference(weight, scale.view(torch.float8_e8m0fnu), dtype))
        assert found.isfinite().all()
    scale = torch.rand(2, 3) + 0.1  # of V4-Flash-Base
    found = OWN_FP8.dequantize({"weight": codes, "scale": scale}, FP8).to(dtype)
    assert torch.equal(found, reference(codes, scale, dtype))


@pytest.mark.parametrize("experts", FORMATS)
def test_headers_and_values_are_a_copys(model: Path, tmp_path: Path, experts: str):
    found = write_own(model, tmp_path, experts)
    reader, expected = ModelReader(found.source), load_file(found.copy / WEIGHTS)
    assert reader.tensors.keys() == expected.keys()
    assert reader.matrices == ModelReader(found.copy).matrices
    assert {entry.dtype for entry in reader.tensors.values()} == {"BF16", "F32", "I64"}
    for name, values in expected.items():
        assert torch.equal(reader.load(name), values), name
    stored = load_file(found.source / WEIGHTS)
    assert stored[f"{EXPERT}.weight"].dtype == (torch.int8 if experts == "fp4" else torch.float8_e4m3fn)
    assert stored[f"{WQ_B}.scale"].dtype == (torch.float8_e8m0fnu if experts == "fp4" else torch.float32)


@pytest.mark.parametrize("experts", FORMATS)
def test_a_checkpoint_is_a_copys(model: Path, tmp_path: Path, experts: str):
    """To the byte, what is kept and what predicts further tokens included; the recipe names the formats."""
    found = write_own(model, tmp_path, experts)
    conversion = Conversion(FAST, parse_policies("uniform=16"))
    made = [convert(folder, tmp_path / "out" / folder.parent.name, conversion, progress=False).out for folder in found]
    assert content(made[0], FORMATS[experts]) == content(made[1])
    (shard,) = made[0].glob("*.safetensors")
    tensors, copy = load_file(shard), load_file(found.copy / WEIGHTS)
    for name in ("layers.0.attn.wo_a", "layers.1.attn.indexer.wq_b", "mtp.0.ffn.experts.3.w2", "mtp.0.e_proj"):
        assert torch.equal(tensors[f"{name}.weight"], copy[f"{name}.weight"])
    assert not [name for name in tensors if name.endswith(".scale")]
    assert json.loads((made[0] / "config.json").read_text())["expert_dtype"] == "milo"


@pytest.mark.parametrize(
    ("stated", "config", "message"),
    [
        ({"weight_block_size": None}, {}, "weight_block_size is missing, which deepseek_v4's FP8 matrices have"),
        ({"weight_block_size": [128]}, {}, "weight_block_size must be the sizes of a block"),
        ({"fmt": "e5m2"}, {}, "fmt is 'e5m2', which is not e4m3"),
        ({"moe_quant_algo": "NVFP4"}, {}, "moe_quant_algo is 'NVFP4', whose experts are not read"),
        ({}, {"expert_dtype": "int4"}, "expert_dtype is 'int4', not fp4 or fp8; convert the original"),
    ],
)
def test_what_is_not_read(stated: dict[str, Any], config: dict[str, Any], message: str):
    whole = {"model_type": "deepseek_v4", **config, "quantization_config": OWN | stated}
    with pytest.raises(ConversionError, match=rf"^config\.json: .*{message}"):
        find_schemes(whole, Path("config.json"))


def test_by_model_type():
    """A copy whose config says nothing of formats is in 16 bits, whatever ``expert_dtype``; others have other names."""
    path = Path("config.json")
    assert find_schemes({"model_type": "deepseek_v4", "expert_dtype": "fp4"}, path) == ()
    own = {"model_type": "deepseek_v4", "quantization_config": OWN}
    assert [scheme.format for scheme in find_schemes(own, path)] == [OWN_FP8, OWN_FP4]
    renamed = own | {"quantization_config": OWN | {"quant_method": "deepseek_v4_fp8"}}
    assert find_schemes(renamed, path) == find_schemes(own, path)
    (other,) = find_schemes(own | {"model_type": "deepseek_v3"}, path)
    assert other.format.scale == "weight_scale_inv"


BROKEN: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "no scale": (lambda t: t.pop(f"{EXPERT}.scale"), rf"{EXPERT}\.scale: missing, and by config\.json .* FP4 e2m1"),
    "scales of blocks": (
        lambda t: t.update({f"{EXPERT}.scale": torch.ones(2, 1, dtype=torch.float8_e8m0fnu)}),
        rf"{EXPERT}\.scale is F8_E8M0 \[2, 1\], but of 192x128 weights .* must be F8_E8M0 or U8 \[192, 4\]",
    ),
    "fp4 elsewhere": (
        lambda t: t.update({f"{WQ_B}.weight": torch.zeros(4096, 64, dtype=torch.int8)}),
        rf"{WQ_B}\.weight is I8, but by config\.json the format of its module is FP8 e4m3 \(DeepSeek-V4\)",
    ),
    "experts in fp8": (
        lambda t: t.update({f"{EXPERT}.weight": torch.zeros(192, 128).to(torch.float8_e4m3fn)}),
        rf"{EXPERT}\.weight is F8_E4M3, but by config\.json the format of its module is FP4 e2m1",
    ),
    "a scale without codes": (
        lambda t: t.update({f"{WQ_B}.weight": t[f"{WQ_B}.weight"].bfloat16()}),
        rf"{WQ_B}\.scale belongs to no matrix as config\.json describes them .* is BF16",
    ),
}
BROKEN_VALUES: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "nan scale": (
        lambda t: t[f"{WQ_B}.scale"].view(torch.uint8)[0].fill_(255),
        rf"model\.safetensors.*{WQ_B}\.scale holds a scale that is NaN",
    ),
    "too large": (
        lambda t: t[f"{EXPERT}.scale"].view(torch.uint8)[0].fill_(254),
        rf"model\.safetensors.*{EXPERT}\.weight holds NaN or Inf",
    ),
}


@pytest.fixture(scope="module")
def stored(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_own(model, tmp_path_factory.mktemp("own"), "fp4")


@pytest.mark.parametrize("case", [*BROKEN, *BROKEN_VALUES])
def test_broken_tensors(stored: Written, tmp_path: Path, case: str):
    edit, message = (BROKEN | BROKEN_VALUES)[case]
    source = shutil.copytree(stored.source, tmp_path / "model")
    edit_tensors(source, WEIGHTS, edit)
    refused(source, tmp_path / "out", message)


def test_what_the_config_does_not_say_is_not_guessed(stored: Written, tmp_path: Path):
    """Codes without a ``quantization_config``, which someone took out, are no weights."""
    source = shutil.copytree(stored.source, tmp_path / "model")
    edit_config(source, quantization_config=None)
    refused(source, tmp_path / "out", r"is (F8_E4M3|I8); weights must be one of BF16, F16, F32")
