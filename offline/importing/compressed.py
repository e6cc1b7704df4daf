"""Checkpoints of compressed-tensors in its format ``pack-quantized``, as llm-compressor writes them.

A matrix is ``weight_packed`` int32 [N, ⌈K/10⌉] with ten codes a word, the two highest bits unused; ``weight_scale``
[N, G]; ``weight_shape``, which is N and K; and, unless it is symmetric, ``weight_zero_point`` int32 [⌈N/10⌉, G], packed
along N. Codes and zero points stand for integers from -4 to 3, less 4 than what is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vllm_milo.checkpoint import BITS
from vllm_milo.kernels.integers import WORD, unpack_words
from vllm_milo.shards import TensorEntry

from ..errors import ConversionError
from .grid import Grid, Load, Size, refuse_order, require, require_shape

_IN_WORD = WORD // BITS
_SYMMETRIC = 4
"""Zero point of matrices that store none."""
_FORMAT = ("pack-quantized", None)


class CompressedTensors:
    """A checkpoint in the format of compressed-tensors.

    Args:
        config: its ``quantization_config``.
        what: what messages call that.

    Raises:
        ConversionError: it states another number of bits, another layout, or quantized activations.
    """

    title = "compressed-tensors"
    needed: tuple[str, ...] = ("weight_packed", "weight_scale", "weight_shape")
    leaves: tuple[str, ...] = (*needed, "weight_zero_point", "weight_g_idx")

    def __init__(self, config: Mapping[str, Any], what: str) -> None:
        require(config, "format", (*_FORMAT, "mixed-precision"), what)
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise ConversionError(f"{what} has no config_groups; copy the file again")
        for key in ("transform_config", "kv_cache_scheme"):
            if config.get(key):
                raise ConversionError(f"{what}.{key} is set, which MiLo does not have; quantize the original")
        for name, group in groups.items():
            _check_group(group, f"{what}.config_groups.{name}")

    def size(self, module: str, entries: Mapping[str, TensorEntry], load: Load) -> Size:
        """Return the size of a matrix by the headers of its tensors, and by the one that states it.

        Raises:
            ConversionError: they are not those of a 3-bit matrix.
        """
        require_shape(f"{module}.weight_shape", entries["weight_shape"], ("I32", "I64"), (2,))
        n, k = load(f"{module}.weight_shape").tolist()
        scales = entries["weight_scale"].shape
        groups = scales[1] if len(scales) == 2 else 0
        if min(n, k) < 1 or not groups:
            raise ConversionError(f"{module}.weight_scale: {list(scales)} are no groups of a matrix [{n}, {k}]")
        require_shape(f"{module}.weight_scale", entries["weight_scale"], ("F16", "BF16", "F32"), (n, groups))
        require_shape(f"{module}.weight_packed", entries["weight_packed"], ("I32",), (n, -(-k // _IN_WORD)))
        if "weight_zero_point" in entries:
            zero = f"{module}.weight_zero_point"
            require_shape(zero, entries["weight_zero_point"], ("I32",), (-(-n // _IN_WORD), groups))
        if "weight_g_idx" in entries:
            require_shape(f"{module}.weight_g_idx", entries["weight_g_idx"], ("I32", "I64"), (k,))
        return Size(n, k, groups)

    def read(self, module: str, tensors: Mapping[str, torch.Tensor], size: Size) -> Grid:
        """Return a matrix.

        Raises:
            ConversionError: its inputs are not in order.
        """
        if "weight_g_idx" in tensors:
            refuse_order(f"{module}.weight_g_idx", tensors["weight_g_idx"], size)
        scale = tensors["weight_scale"]
        if "weight_zero_point" in tensors:
            zero = unpack_words(tensors["weight_zero_point"].T, BITS, size.n).T
        else:
            zero = torch.full(scale.shape, _SYMMETRIC, dtype=torch.uint8)
        return Grid(unpack_words(tensors["weight_packed"], BITS, size.k), scale, zero)


def _check_group(group: Any, what: str) -> None:
    """Refuse a group of layers whose weights are not 3-bit integers, or whose inputs are quantized."""
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise ConversionError(f"{what} states no weights; copy the file again")
    require(group, "format", _FORMAT, what)
    for key in ("input_activations", "output_activations"):
        require(group, key, (None,), what)
    require(weights, "num_bits", (BITS,), f"{what}.weights")
    require(weights, "type", ("int",), f"{what}.weights")
    require(weights, "strategy", ("group", "channel"), f"{what}.weights")
