"""The tensors of a MiLo checkpoint under their source names, with the weights that codes and factors stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from vllm_milo.checkpoint import TENSOR_NAMES, U_SCALE, V_SCALE, MiLoFormat, U, V
from vllm_milo.kernels.packing import dequantize, dequantize_factor
from vllm_milo.shards import TensorEntry, read_tensors
from vllm_milo.validation import quantized_modules

from ..source.streamed_model import Load

_CPU = torch.device("cpu")


def dequantized_tensors(
    folder: Path, fmt: MiLoFormat, dtype: torch.dtype, prefix: str = ""
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a MiLo checkpoint whose source names begin with ``prefix``, quantized matrices as ``dtype``.

    Raises:
        ShardError: a file is missing, truncated or unreadable.
    """
    yield from dequantizing_load(folder, fmt, dtype)(prefix)


def dequantizing_load(folder: Path, fmt: MiLoFormat, dtype: torch.dtype, device: torch.device = _CPU) -> Load:
    """Return what yields the tensors of a MiLo checkpoint by prefix of their source names.

    The headers are read once, here; what a prefix names is read, and its matrices dequantized, one tensor at a time.

    Args:
        folder: of the checkpoint, which :func:`validate_checkpoint` has found whole.
        fmt: of the checkpoint.
        dtype: of dequantized matrices, whose arithmetic is float32; other tensors come as they are stored.
        device: where matrices are dequantized and returned; other tensors stay on the CPU.

    Raises:
        ShardError: a file is missing, truncated or unreadable.
    """
    from safetensors import safe_open

    entries = read_tensors(folder)
    modules = quantized_modules(entries)

    def select(prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        plain = [n for n in entries if n.startswith(prefix) and n.rpartition(".")[2] not in TENSOR_NAMES]
        matrices = {name: found for name, found in modules.items() if f"{name}.weight".startswith(prefix)}
        files = {entries[name].file for name in plain}
        files |= {entry.file for found in matrices.values() for entry in found.values()}
        handles = {file: safe_open(file, framework="pt") for file in files}
        for name in plain:
            yield name, handles[entries[name].file].get_tensor(name)

        def load(name: str) -> torch.Tensor:
            return handles[entries[name].file].get_tensor(name).to(device)

        for name, found in matrices.items():
            yield f"{name}.weight", _dequantize_matrix(name, found, fmt, load).to(dtype)

    return select


def _dequantize_matrix(
    module: str, found: dict[str, TensorEntry], fmt: MiLoFormat, load: Callable[[str], torch.Tensor]
) -> torch.Tensor:
    """Return the weights s·(q - z) + UᵀV of one matrix, float32 [N, K]."""
    tensors = {name: load(f"{module}.{name}") for name in found}
    weight = dequantize(tensors["weight_packed"], tensors["weight_scale"], tensors["weight_zero"], fmt.group_size)
    if U not in tensors:
        return weight
    bits = fmt.compensator.bits
    u = dequantize_factor(tensors[U], tensors.get(U_SCALE), bits)
    return weight + u.T @ dequantize_factor(tensors[V], tensors.get(V_SCALE), bits)
