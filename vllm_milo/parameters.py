"""What the parameters of quantized layers share: the fill guard, shape checks, slices of factors.

vLLM's loaders accept missing and smaller tensors in silence, and know nothing of rank-major factors. Here
every piece of every parameter must arrive once, with exactly the shape that the checkpoint contract says.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from vllm_milo.checkpoint import U_SCALE, V_SCALE, CheckpointError, CompensatorFormat, TensorSpec
from vllm_milo.dtypes import MODEL_DTYPES, safetensors_name

ANY_FLOAT = "floating point"
"""Expected dtype of 16-bit factors: the model may be served in another dtype than it was stored in."""
_SHOWN_PIECES = 4


class FillGuard:
    """Records which pieces of a layer's parameters were loaded, and refuses a layer with gaps.

    Args:
        layer: the layer's name, for messages.
    """

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self._missing: dict[str, TensorSpec] = {}
        self._filled: set[str] = set()

    def expect(self, pieces: Iterable[tuple[str, TensorSpec]]) -> None:
        """Announce pieces by checkpoint name, with dtype and unsharded shape."""
        self._missing.update(pieces)

    def fill(self, piece: str, tensor: torch.Tensor) -> None:
        """Check a piece that has arrived and mark it as filled.

        Raises:
            CheckpointError: the piece is not expected, came before, or has another dtype or shape.
        """
        expected = self._missing.pop(piece, None)
        found_dtype, found_shape = safetensors_name(str(tensor.dtype)) or str(tensor.dtype), tuple(tensor.shape)
        if expected is None:
            reason = "appears twice" if piece in self._filled else "is extra: the rank table gives it no place"
            raise CheckpointError(
                f"{piece} {reason} (layer {self.layer}, found {found_dtype} {list(found_shape)}); "
                f"convert the model again"
            )
        dtype, shape = expected
        same_dtype = found_dtype == dtype or (dtype == ANY_FLOAT and found_dtype in MODEL_DTYPES)
        if not same_dtype or found_shape != shape:
            raise CheckpointError(
                f"{piece} (layer {self.layer}): expected {dtype} {list(shape)}, "
                f"found {found_dtype} {list(found_shape)}; convert the model again"
            )
        self._filled.add(piece)

    def check(self) -> None:
        """Raise CheckpointError if a piece is still missing."""
        if not self._missing:
            return
        shown = [f"{name} {dtype} {list(shape)}" for name, (dtype, shape) in self._missing.items()]
        more = f" and {len(shown) - _SHOWN_PIECES} more" if len(shown) > _SHOWN_PIECES else ""
        raise CheckpointError(
            f"layer {self.layer}: the checkpoint lacks {', '.join(shown[:_SHOWN_PIECES])}{more}; "
            f"restore its files or convert the model again"
        )


def factor_dtype(tensor: str, compensator: CompensatorFormat, params_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a factor, or its scales, is held until the backend prepares it."""
    if tensor in (U_SCALE, V_SCALE):
        return torch.float16
    return {3: torch.int32, 8: torch.int8, 16: params_dtype}[compensator.bits]


class FactorSlice(NamedTuple):
    """The columns of a factor that this rank holds: ``columns`` values from ``start``."""

    start: int
    columns: int

    def elements(self, compensator: CompensatorFormat, tensor: torch.Tensor, is_scale: bool) -> torch.Tensor:
        """Return this rank's columns of a stored factor, or of its scales."""
        unit = compensator.group_size if is_scale else 1
        size = 3 * self.columns // 32 if compensator.bits == 3 and not is_scale else self.columns // unit
        begin = 3 * self.start // 32 if compensator.bits == 3 and not is_scale else self.start // unit
        return tensor.narrow(1, begin, size)


def require_multiple(layer: str, what: str, size: int, multiple: int, tp_size: int) -> None:
    """Refuse a split of a layer over ranks that cuts a packed word or a scale group.

    Raises:
        CheckpointError: ``size`` is not a multiple of ``multiple``.
    """
    if size % multiple:
        raise CheckpointError(
            f"{layer}: tensor parallel size {tp_size} leaves {what} {size}, which is not a multiple of "
            f"{multiple}; use a smaller -tp, or --enable-expert-parallel for experts"
        )


def require_split(
    layer: str,
    n: int,
    k: int,
    group_size: int,
    compensator: CompensatorFormat,
    has_rank: bool,
    tp_size: int,
) -> None:
    """Refuse tensor parallelism that the layout of one rank's [n, k] part of a matrix does not allow.

    Raises:
        CheckpointError: k cuts a group, a packed word or a scale of V; or n a scale of U.
    """
    of_n, of_k = compensator.split_multiples(group_size, has_rank)
    require_multiple(layer, "input size", k, of_k, tp_size)
    require_multiple(layer, "output size", n, of_n, tp_size)
