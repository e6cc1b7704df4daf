"""Tiny checkpoints as GPTQ and compressed-tensors write them, and the weights that they stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file

from vllm_milo.offline.source.reader import ModelReader

WEIGHTS = "model.safetensors"


class Foreign(NamedTuple):
    """A checkpoint's folder, and the weights of its quantized matrices, float32, by module."""

    folder: Path
    weights: dict[str, torch.Tensor]


class Drawn(NamedTuple):
    """A random 3-bit matrix: codes [N, K], scales and zero points [N, G]."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor


def draw(n: int, k: int, group: int, symmetric: bool, dtype: torch.dtype, lowest: int = 1) -> Drawn:
    shape = (n, k // group)
    zero = torch.full(shape, 4) if symmetric else torch.randint(lowest, 8, shape)
    scale = (torch.rand(shape) * 0.05 + 0.01).to(torch.bfloat16).to(dtype)
    return Drawn(torch.randint(0, 8, (n, k)), scale, zero)


def bit_stream(codes: list[int]) -> list[int]:
    """The int32 words of 3-bit codes, by way of one large number."""
    number = sum(code << 3 * index for index, code in enumerate(codes))
    words = [number >> 32 * index & 0xFFFFFFFF for index in range(len(codes) * 3 // 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def gptq_tensors(drawn: Drawn, version: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A matrix as GPTQ stores it, and its weights by the definition, element by element."""
    k, groups = drawn.codes.shape[1], drawn.scale.shape[1]
    index = torch.arange(k) // (k // groups)
    zeros = drawn.zero.T - (1 if version == 1 else 0)
    tensors = {
        "qweight": torch.tensor([bit_stream(row) for row in drawn.codes.tolist()], dtype=torch.int32).T.contiguous(),
        "qzeros": torch.tensor([bit_stream(row) for row in zeros.tolist()], dtype=torch.int32),
        "scales": drawn.scale.T.contiguous(),
        "g_idx": index.int(),
    }
    weights = drawn.scale.float()[:, index] * (drawn.codes - drawn.zero[:, index]).float()
    return tensors, weights


def compressed_tensors(drawn: Drawn, symmetric: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A matrix as compressed-tensors stores it, and the weights that its own code makes of that."""
    tensors = {
        "weight_packed": pack_to_int32((drawn.codes - 4).to(torch.int8), 3),
        "weight_scale": drawn.scale,
        "weight_shape": torch.tensor(drawn.codes.shape),
    }
    if not symmetric:
        packed = pack_to_int32((drawn.zero - 4).to(torch.int8), 3, packed_dim=0)
        tensors["weight_zero_point"] = packed.contiguous()
    arguments = QuantizationArgs(num_bits=3, symmetric=symmetric, group_size=64, strategy="group")
    wide = tensors | {"weight_scale": drawn.scale.float()}
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    return tensors, PackedQuantizationCompressor.decompress(wide, scheme)["weight"]


def make(
    source: Path,
    folder: Path,
    quantization: dict[str, Any],
    stored: Callable[[str, int, int], tuple[dict[str, torch.Tensor], torch.Tensor]],
    kept: tuple[str, ...] = (),
) -> Foreign:
    """Copy an unquantized model with each matrix stored as ``stored`` makes it, but for those that are ``kept``."""
    shutil.copytree(source, folder)
    tensors, weights = load_file(source / WEIGHTS), {}
    for matrix in ModelReader(source).matrices:
        if not any(part in matrix.name for part in kept):
            del tensors[f"{matrix.name}.weight"]
            own, weights[matrix.name] = stored(matrix.name, matrix.n, matrix.k)
            tensors |= {f"{matrix.name}.{leaf}": tensor for leaf, tensor in own.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return Foreign(folder, weights)


def gptq(
    source: Path,
    folder: Path,
    version: int = 1,
    symmetric: bool = True,
    group: int = 64,
    kept: tuple[str, ...] = (),
    **options: Any,
) -> Foreign:
    """A GPTQ checkpoint of an unquantized model's shapes; scales are fp16. ``options`` are those of :func:`draw`."""
    quantization = {"quant_method": "gptq", "bits": 3, "group_size": group, "desc_act": False, "sym": symmetric}
    if version == 2:
        quantization["checkpoint_format"] = "gptq_v2"

    def stored(_: str, n: int, k: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        size = k if group == -1 else group
        return gptq_tensors(draw(n, k, size, symmetric, torch.float16, **options), version)

    return make(source, folder, quantization, stored, kept)


def compressed(source: Path, folder: Path, symmetric: bool = True, group: int = 64) -> Foreign:
    """A checkpoint of compressed-tensors of an unquantized model's shapes; scales are bf16, as of llm-compressor."""
    weights = {"num_bits": 3, "type": "int", "symmetric": symmetric, "group_size": group, "strategy": "group"}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head", "re:.*gate$"],
    }

    def stored(_: str, n: int, k: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return compressed_tensors(draw(n, k, group, symmetric, torch.bfloat16, lowest=0), symmetric)

    return make(source, folder, quantization, stored)
