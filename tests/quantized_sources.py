"""Models whose matrices are stored with fewer than 16 bits a weight, written by the tests, and the same in bfloat16.

The copies in bfloat16 are by compressed-tensors and, for FP8 in blocks, by plain loops.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
KEPT = r"norm|embed_tokens|lm_head|\.gate\.weight|router"
"""What such models have in 16 bits."""
Tensors = dict[str, torch.Tensor]
Packed = Mapping[str, torch.Tensor]


class Written(NamedTuple):
    """A model as it is stored, and as values in bfloat16."""

    source: Path
    copy: Path


class Way(NamedTuple):
    """A way to store matrices: config.json's ``quantization_config``, and how a matrix is encoded and decoded."""

    config: dict[str, Any]
    encode: Callable[[torch.Tensor, dict[str, Any]], Tensors]
    decode: Callable[[Tensors, dict[str, Any]], torch.Tensor]


def _in_fp8(weight: torch.Tensor, size: int, powers: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 codes and a scale for each block, a power of two or not, by plain loops."""
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scale = torch.empty(-(-weight.shape[0] // size), -(-weight.shape[1] // size))
    for row, column in torch.cartesian_prod(torch.arange(scale.shape[0]), torch.arange(scale.shape[1])).tolist():
        block = slice(row * size, (row + 1) * size), slice(column * size, (column + 1) * size)
        least = weight[block].float().abs().max() / 448
        scale[row, column] = least.log2().ceil().exp2() if powers else least
        codes[block] = (weight[block].float() / scale[row, column]).to(torch.float8_e4m3fn)
    return codes, scale


def encode_fine(weight: torch.Tensor, config: dict[str, Any]) -> Tensors:
    """FP8 with a scale for each block, by plain loops."""
    codes, scale = _in_fp8(weight, config["weight_block_size"][0])
    return {"weight": codes, "weight_scale_inv": scale}


def decode_fine(tensors: Tensors, config: dict[str, Any]) -> torch.Tensor:
    """The values of :func:`encode_fine`, element by element of the scales."""
    size, values = config["weight_block_size"][0], tensors["weight"].float()
    scale = tensors["scale" if "scale" in tensors else "weight_scale_inv"].float()
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            values[row * size : (row + 1) * size, column * size : (column + 1) * size] *= scale[row, column]
    return values.bfloat16()


def encode_own(weight: torch.Tensor, config: dict[str, Any]) -> Tensors:
    """DeepSeek-V4's FP8, whose scales are powers of two but for V4-Flash-Base's."""
    powers = config.get("scale_fmt") == "ue8m0"
    codes, scale = _in_fp8(weight, config["weight_block_size"][0], powers)
    return {"weight": codes, "scale": scale.to(torch.float8_e8m0fnu) if powers else scale}


def encode_fp4(weight: torch.Tensor, config: dict[str, Any]) -> Tensors:
    """DeepSeek-V4's FP4: e2m1, the earlier of two in the lower half of a byte, and a power of two for 32 of a row."""
    parts = weight.double().unflatten(1, (-1, 32))
    scale = (parts.abs().amax(-1, keepdim=True) / 6).log2().ceil().exp2()
    table = torch.tensor([e2m1(code) for code in range(16)], dtype=torch.float64)
    codes = (parts[..., None] / scale[..., None] - table).abs().argmin(-1).flatten(1).to(torch.uint8)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    return {"weight": packed.view(torch.int8), "scale": scale[..., 0].float().to(torch.float8_e8m0fnu)}


def decode_fp4(tensors: Tensors, config: dict[str, Any]) -> torch.Tensor:
    """The values of :func:`encode_fp4`, number by number."""
    packed, exponents = tensors["weight"].view(torch.uint8).tolist(), tensors["scale"].view(torch.uint8).tolist()
    rows = [
        [
            e2m1(byte >> 4 * half & 15) * 2.0 ** (powers[column // 16] - 127)
            for column, byte in enumerate(codes)
            for half in (0, 1)
        ]
        for codes, powers in zip(packed, exponents, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64).bfloat16()


def e2m1(code: int) -> float:
    """Return the number of a sign, two bits of exponent and one of mantissa."""
    exponent, mantissa = code >> 1 & 3, code & 1
    size = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
    return -size if code & 8 else size


def encode_whole(weight: torch.Tensor, config: dict[str, Any]) -> Tensors:
    """FP8 with one scale for a matrix."""
    scale = weight.float().abs().max() / 448
    return {"weight": (weight.float() / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def decode_whole(tensors: Tensors, config: dict[str, Any]) -> torch.Tensor:
    """The values of :func:`encode_whole`."""
    return (tensors["weight"].float() * tensors["weight_scale"].float()).bfloat16()


def _compressor(config: dict[str, Any]) -> tuple[Any, Any]:
    """The class of compressed-tensors for a config, and its scheme."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    scheme = QuantizationConfig(**{key: config[key] for key in ("config_groups", "format")}).config_groups["group_0"]
    return BaseCompressor.get_value_from_registry(config["format"]), scheme


def encode_compressed(weight: torch.Tensor, config: dict[str, Any]) -> Tensors:
    """What compressed-tensors stores of a matrix."""
    compressor, scheme = _compressor(config)
    args = scheme.weights
    groups = {"group": weight.shape[1] // (args.group_size or 1), "channel": 1}.get(args.strategy)
    if args.strategy == "block":
        return _in_blocks(weight, args.block_structure, compressor, scheme)
    parts = weight.float().unflatten(1, (groups, -1)) if groups else weight.float().reshape(1, 1, -1)
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    most = 2.0 ** (args.num_bits - 1) - 1 if args.type == "int" else {8: 448.0, 4: 6.0}[args.num_bits]
    held: dict[str, Any] = {"weight": weight, "weight_scale": torch.maximum(-low, high) / most}
    if not args.symmetric:
        levels = 2**args.num_bits
        held["weight_scale"] = (high - low) / (levels - 1)
        zero = (-low / held["weight_scale"] - levels // 2).round().clamp(-levels // 2, levels // 2 - 1)
        held["weight_zero_point"] = zero.to(torch.int8)
    if args.type == "float" and args.num_bits == 4:
        held["weight_scale"] = held["weight_scale"].log2().ceil().exp2()
    held["weight_scale"] = held["weight_scale"].bfloat16()
    found = compressor.compress(held, scheme)
    return {leaf: tensor.contiguous() for leaf, tensor in found.items()}


def _in_blocks(weight: torch.Tensor, block: list[int], compressor: Any, scheme: Any) -> Tensors:
    """What compressed-tensors stores of a matrix in blocks, those at its ends filled up with zeros."""
    n, k = ((size + side - 1) // side for size, side in zip(weight.shape, block, strict=True))
    whole = torch.zeros(n * block[0], k * block[1])
    whole[: weight.shape[0], : weight.shape[1]] = weight
    scale = whole.view(n, block[0], k, block[1]).abs().amax((1, 3)) / 448
    found = compressor.compress({"weight": weight, "weight_scale": scale.bfloat16()}, scheme)
    return {leaf: tensor.contiguous() for leaf, tensor in found.items()}


def decode_compressed(tensors: Tensors, config: dict[str, Any]) -> torch.Tensor:
    """The values that compressed-tensors makes of what it stores."""
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    compressor, scheme = _compressor(config)
    if scheme.weights.strategy == "block":  # its decompress takes the sides of blocks for a quotient of shapes
        return dequantize(tensors["weight"], tensors["weight_scale"], args=scheme.weights).bfloat16()
    return compressor.decompress(dict(tensors), scheme)["weight"].bfloat16()


def _fp8(**settings: Any) -> Way:
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", **settings}
    fine = "weight_block_size" in settings
    return Way(config, encode_fine if fine else encode_whole, decode_fine if fine else decode_whole)


def _compressed(kind: str, **weights: Any) -> Way:
    active = {"num_bits": 8, "type": weights["type"], "strategy": "token", "dynamic": True, "symmetric": True}
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}
    group["input_activations"] = active if kind in ("float-quantized", "int-quantized") else None
    config = {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group}}
    return Way(
        config | {"ignore": ["lm_head"], "sparsity_config": {"format": "dense"}, "transform_config": {}},
        encode_compressed,
        decode_compressed,
    )


WAYS = {
    "fp8 blocks": _fp8(weight_block_size=[128, 128]),
    "fp8 matrix": _fp8(),
    "float channel": _compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    "float tensor": _compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
    "float blocks": _compressed(
        "float-quantized", num_bits=8, type="float", strategy="block", block_structure=[64, 128]
    ),
    "int8 channel": _compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
    "packed int4 groups of 32": _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
    "packed int4 groups with zero points": _compressed(
        "pack-quantized", num_bits=4, type="int", strategy="group", group_size=64, symmetric=False
    ),
    "packed int4 rows": _compressed("pack-quantized", num_bits=4, type="int", strategy="channel"),
    "packed int8 rows with zero points": _compressed(
        "pack-quantized", num_bits=8, type="int", strategy="channel", symmetric=False
    ),
    "mxfp4": _compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
}


OWN_KEPT = r"norm|^embed|^head|\.gate\.|\.compressor\.|weights_proj|hc_|tid2eid"
"""What DeepSeek-V4's makers have in 16 bits or more, by transformers' class and vLLM's."""
_OWN = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
OWN = {
    "fp4": (
        Way(_OWN | {"scale_fmt": "ue8m0"}, encode_own, decode_fine),
        Way({}, encode_fp4, decode_fp4),
    ),
    "fp8": (Way(_OWN, encode_own, decode_fine), None),
}
"""How DeepSeek-V4's makers store matrices, and routed experts' where that is another way, by its ``expert_dtype``."""


def write_own(model: Path, folder: Path, expert_dtype: str) -> Written:
    """Write a DeepSeek-V4 in bfloat16 as its makers do, and what that makes of it in bfloat16."""
    way, experts = OWN[expert_dtype]
    found = write_both(model, folder, way, OWN_KEPT, experts)
    for place in found:
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(config | {"expert_dtype": expert_dtype}))
    return found


def write_both(model: Path, folder: Path, way: Way, kept: str = KEPT, experts: Way | None = None) -> Written:
    """Write a model in bfloat16 in another way, and what that makes of it in bfloat16.

    Args:
        model: in bfloat16, in one file.
        folder: for the two, which have the same name.
        way: of storing matrices.
        kept: a pattern of what stays in bfloat16.
        experts: the way of routed experts, where it is another.
    """
    tensors, source, copy = load_file(model / WEIGHTS), folder / "stored" / "model", folder / "copy" / "model"
    stored, values = {}, {}
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or re.search(kept, name):
            stored[name] = values[name] = tensor
            continue
        its = experts if experts is not None and ".experts." in name else way
        parts = its.encode(tensor, its.config)
        stored |= {name.removesuffix("weight") + leaf: part for leaf, part in parts.items()}
        values[name] = its.decode(parts, its.config).contiguous()
    for place, held in ((source, stored), (copy, values)):
        shutil.copytree(model, place)
        save_file(held, place / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": way.config}))
    return Written(source, copy)


def content(folder: Path, source_format: str | None = None) -> dict[str, Any]:
    """The files of a checkpoint, but for what names the source's format, which must be this."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    del files["milo_manifest.json"]
    config = files["config.json"] = json.loads(files["config.json"])
    assert config["quantization_config"]["quant_method"] == "milo"
    assert config["quantization_config"]["recipe"].pop("source_format", None) == source_format
    card = files.pop("README.md").decode()
    assert source_format is None or source_format in card
    return files


def split_shards(folder: Path, shard_of: Callable[[str], int]) -> list[str]:
    """Put a model's tensors into several files with an index; return the files' names."""
    tensors = load_file(folder / WEIGHTS)
    numbers = sorted({shard_of(name) for name in tensors})
    names = {number: f"model-{place:05d}-of-{len(numbers):05d}.safetensors" for place, number in enumerate(numbers, 1)}
    for number, file in names.items():
        held = {name: tensor for name, tensor in tensors.items() if shard_of(name) == number}
        save_file(held, folder / file, metadata={"format": "pt"})
    (folder / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": {name: names[shard_of(name)] for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return list(names.values())
