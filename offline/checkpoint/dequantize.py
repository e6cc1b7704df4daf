"""The tensors of a MiLo checkpoint under their source names, with the weights that codes and factors stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from vllm_milo.checkpoint import TENSOR_NAMES, U_SCALE, V_SCALE, MiLoFormat, U, V
from vllm_milo.kernels.packing import dequantize, dequantize_factor
from vllm_milo.shards import TensorEntry, read_tensors
from vllm_milo.validation import quantized_modules


def dequantized_tensors(folder: Path, fmt: MiLoFormat, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of a MiLo checkpoint under its source name, quantized matrices as ``dtype``."""
    from safetensors import safe_open

    entries = read_tensors(folder)
    modules = quantized_modules(entries)
    files = {entry.file for entry in entries.values()}
    handles = {file: safe_open(file, framework="pt") for file in files}

    def load(name: str) -> torch.Tensor:
        return handles[entries[name].file].get_tensor(name)

    for name in entries:
        if name.rpartition(".")[2] not in TENSOR_NAMES:
            yield name, load(name)
    for module, found in modules.items():
        yield f"{module}.weight", _dequantize_matrix(module, found, fmt, load).to(dtype)


def _dequantize_matrix(
    module: str, found: dict[str, TensorEntry], fmt: MiLoFormat, load: Callable[[str], torch.Tensor]
) -> torch.Tensor:
    tensors = {name: load(f"{module}.{name}") for name in found}
    weight = dequantize(tensors["weight_packed"], tensors["weight_scale"], tensors["weight_zero"], fmt.group_size)
    if U not in tensors:
        return weight
    bits = fmt.compensator.bits
    u = dequantize_factor(tensors[U], tensors.get(U_SCALE), bits)
    return weight + u.T @ dequantize_factor(tensors[V], tensors.get(V_SCALE), bits)
