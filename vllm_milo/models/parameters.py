"""What the parameters of quantized layers share: the fill guard, shape checks, slices of factors.

vLLM's loaders accept missing and smaller tensors in silence, and know nothing of rank-major factors. Here
every piece of every parameter must arrive once, with exactly the shape that the checkpoint contract says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from vllm_milo.checkpoint import U_SCALE, V_SCALE, CheckpointError, CompensatorFormat, TensorSpec
from vllm_milo.dtypes import MODEL_DTYPES, safetensors_name

ANY_FLOAT = "floating point"
"""Expected dtype of 16-bit factors: the model may be served in another dtype than it was stored in."""
_SHOWN_PIECES = 4
MOST_PROCESSES = 64
"""Beyond so many nobody cuts one layer."""


class FillGuard:
    """Records which pieces of a layer's parameters were loaded, and refuses a layer with gaps.

    Args:
        layer: the layer's name, for messages.
    """

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self._missing: dict[str, TensorSpec] = {}
        self._filled: dict[str, TensorSpec] = {}

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
        self._filled[piece] = expected

    def check(self) -> None:
        """Raise CheckpointError if a piece is still missing; else expect all again, of a load that may follow."""
        if not self._missing:
            self._missing, self._filled = self._filled, {}
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


class Cut(NamedTuple):
    """A dimension of a matrix that tensor parallelism cuts into equal parts.

    Attributes:
        matrix: its name, for messages.
        what: "input size" or "output size".
        size: of the whole matrix.
        multiple: what a part's size must be a multiple of.
        most: most parts; more processes share them. None for no limit.
    """

    matrix: str
    what: str
    size: int
    multiple: int
    most: int | None = None

    def parts(self, processes: int) -> int:
        """Return over how many parts so many processes cut it."""
        return processes if self.most is None else min(processes, self.most)

    def allows(self, processes: int) -> bool:
        """Return whether so many processes can hold equal parts of it."""
        return self.size % (self.parts(processes) * self.multiple) == 0


def require_split(cuts: Sequence[Cut], tp_size: int, advice: str = "") -> None:
    """Refuse a tensor parallel size that cuts a packed word or a scale group of a layer.

    Args:
        cuts: all dimensions of the layer's matrices that are cut.
        tp_size: the processes.
        advice: what else may help, for the message.

    Raises:
        CheckpointError: a part is no multiple of what it must be; the message names the first such matrix, the part's
            size and the tensor parallel sizes that the whole layer allows.
    """
    for cut in cuts:
        if not cut.allows(tp_size):
            works = (size for size in range(1, MOST_PROCESSES + 1) if all(each.allows(size) for each in cuts))
            sizes = ", ".join(map(str, works))
            raise CheckpointError(
                f"{cut.matrix}: tensor parallel size {tp_size} leaves {cut.what} {cut.size // cut.parts(tp_size)}, "
                f"which is not a multiple of {cut.multiple}; this layer can be served with -tp {sizes}{advice}"
            )
