"""The tensors of a MiLo checkpoint under their source names, with the weights that codes and factors stand for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vllm_milo.checkpoint import TENSOR_NAMES, U_SCALE, V_SCALE, MiLoFormat, U, V
from vllm_milo.head.layout import HEAD_SCALE, HEAD_TENSORS, HEAD_WORDS, quantized_heads
from vllm_milo.kernels.integers import dequantize_integers
from vllm_milo.kernels.packing import dequantize, dequantize_factor
from vllm_milo.shards import ShardError, read_tensors
from vllm_milo.validation import quantized_modules
from vllm_milo.values import one_line

_HEAD_ROWS = 4096
"""Of a head that are in float32 at once."""


class DequantizedTensors:
    """A MiLo checkpoint's tensors on demand.

    Args:
        folder: the checkpoint.
        fmt: its format.
        dtype: of the weights of quantized matrices and heads; other tensors stay as they are stored.
        device: where codes become weights, and where these lie.

    Attributes:
        matrices: names of the quantized matrices.
        heads: names of the output heads that are stored as integers: one or none.
        others: names of the tensors that are stored as they were in the source.
    """

    def __init__(self, folder: Path, fmt: MiLoFormat, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self._format, self._dtype, self._device = fmt, dtype, device
        self._entries = read_tensors(folder)
        self._modules = quantized_modules(self._entries)
        self.matrices = set(self._modules)
        self.heads = set(quantized_heads(self._entries))
        known = (*TENSOR_NAMES, *HEAD_TENSORS)
        self.others = {name for name in self._entries if name.rpartition(".")[2] not in known}
        self._handles: dict[Path, Any] = {}

    def load(self, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors whose names in the source begin with ``prefix``, quantized matrices as ``….weight``."""
        for name in self._entries:
            if name.startswith(prefix) and name in self.others:
                yield name, self.stored(name)
        for module in self._modules:
            if f"{module}.weight".startswith(prefix):
                yield f"{module}.weight", self.weight(module).to(self._dtype)
        for module in self.heads:
            if f"{module}.weight".startswith(prefix):
                yield f"{module}.weight", self.head(module)

    def stored(self, name: str) -> torch.Tensor:
        """Return a tensor as it is stored.

        Raises:
            ShardError: it cannot be read.
        """
        file = self._entries[name].file
        try:
            if file not in self._handles:
                self._handles[file] = safe_open(file, framework="pt")
            return self._handles[file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ShardError(f"{file}: cannot read tensor {name}: {one_line(error)}; copy it again") from error

    def packed(self, module: str) -> dict[str, torch.Tensor]:
        """Return the tensors of a quantized matrix as they are stored, by their last names.

        Raises:
            ShardError: they cannot be read.
        """
        return {name: self.stored(f"{module}.{name}").to(self._device) for name in self._modules[module]}

    def weight(self, module: str) -> torch.Tensor:
        """Return the weights, float32 [N, K], that the codes and factors of a quantized matrix stand for.

        Raises:
            ShardError: they cannot be read.
        """
        tensors = self.packed(module)
        packed, scale, zero = (tensors[name] for name in ("weight_packed", "weight_scale", "weight_zero"))
        weight = dequantize(packed, scale, zero, self._format.module_group_size(module))
        if U not in tensors:
            return weight
        bits = self._format.compensator.bits
        u = dequantize_factor(tensors[U], tensors.get(U_SCALE), bits)
        return weight + u.T @ dequantize_factor(tensors[V], tensors.get(V_SCALE), bits)

    def head(self, module: str) -> torch.Tensor:
        """Return the weights [V, H] that a head's integers stand for, some rows after another.

        Raises:
            ShardError: they cannot be read.
        """
        words, scale = (self.stored(f"{module}.{leaf}").to(self._device) for leaf in (HEAD_WORDS, HEAD_SCALE))
        bits = self._format.lm_head_bits
        rows = zip(words.split(_HEAD_ROWS), scale.split(_HEAD_ROWS), strict=True)
        return torch.cat([dequantize_integers(*held, bits).to(self._dtype) for held in rows])
