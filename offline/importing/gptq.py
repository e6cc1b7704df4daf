"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them.

A matrix is ``qweight`` int32 [3K/32, N], whose columns are the bit streams that MiLo has as rows; ``scales`` [G, N];
and ``qzeros`` int32 [G, 3N/32], whose rows are such streams. ``g_idx`` [K] says the group of each input. Version 1
stores zero points less one, version 2 as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vllm_milo.kernels.packing import MAX_CODE, unpack_codes
from vllm_milo.shards import TensorEntry

from ..errors import ConversionError
from .grid import Grid, Load, Size, refuse_order, require, require_shape

_SCALES = ("F16", "BF16", "F32")


class Gptq:
    """A checkpoint in the format of GPTQ.

    Args:
        config: its ``quantization_config``.
        what: what messages call that.

    Raises:
        ConversionError: it states another number of bits or another layout.
    """

    title = "GPTQ"
    needed: tuple[str, ...] = ("qweight", "qzeros", "scales")
    leaves: tuple[str, ...] = (*needed, "g_idx")

    def __init__(self, config: Mapping[str, Any], what: str) -> None:
        require(config, "bits", (3,), what)
        require(config, "checkpoint_format", ("gptq", "gptq_v2"), what)
        self._offset = 0 if config.get("checkpoint_format") == "gptq_v2" else 1

    def size(self, module: str, entries: Mapping[str, TensorEntry], load: Load) -> Size:
        """Return the size of a matrix by the headers of its tensors.

        Raises:
            ConversionError: they are not those of a 3-bit matrix.
        """
        words, scales = (entries[leaf].shape for leaf in ("qweight", "scales"))
        if len(words) != 2 or len(scales) != 2 or not scales[0]:
            raise ConversionError(f"{entries['qweight'].file}: {module}: its tensors must have 2 dimensions")
        size = Size(words[1], words[0] * 32 // 3, scales[0])
        require_shape(f"{module}.qzeros", entries["qzeros"], ("I32",), (size.groups, size.n * 3 // 32))
        require_shape(f"{module}.scales", entries["scales"], _SCALES, (size.groups, size.n))
        require_shape(f"{module}.qweight", entries["qweight"], ("I32",), (size.k * 3 // 32, size.n))
        if "g_idx" in entries:
            require_shape(f"{module}.g_idx", entries["g_idx"], ("I32", "I64"), (size.k,))
        return size

    def read(self, module: str, tensors: Mapping[str, torch.Tensor], size: Size) -> Grid:
        """Return a matrix.

        Raises:
            ConversionError: its inputs are not in order, or a zero point is one of which readers differ.
        """
        if "g_idx" in tensors:
            refuse_order(f"{module}.g_idx", tensors["g_idx"], size)
        zero = unpack_codes(tensors["qzeros"])
        if self._offset and bool((zero == MAX_CODE).any()):
            raise ConversionError(
                f"{module}.qzeros: holds zero points that are 8 to some readers of GPTQ's version 1 and 0 to others; "
                f"quantize the original with `milo quantize`"
            )
        return Grid(unpack_codes(tensors["qweight"].T.contiguous()), tensors["scales"].T, zero.T + self._offset)
