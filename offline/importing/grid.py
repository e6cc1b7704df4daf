"""A matrix that another tool has quantized to 3 bits, and what of it the MiLo format holds without loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch

from vllm_milo.checkpoint import GROUP_SIZES
from vllm_milo.kernels.packing import dequantize, pack_codes
from vllm_milo.shards import TensorEntry

from ..errors import ConversionError

Load = Callable[[str], torch.Tensor]
"""Returns a tensor of the source by its name."""


class Size(NamedTuple):
    """A matrix [n, k] with so many groups along each row."""

    n: int
    k: int
    groups: int

    @property
    def group_size(self) -> int:
        """Return the largest group size of the MiLo format that cuts no group; that of the source where none does."""
        own = self.k // self.groups
        return max((size for size in GROUP_SIZES if own % size == 0), default=own)


class Grid(NamedTuple):
    """A matrix s·(q - z): codes uint8 [N, K]; scales and zero points [N, G] of G groups of equal size along K."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor

    def weights(self) -> torch.Tensor:
        """Return s·(q - z) in float32, [N, K]."""
        groups = self.codes.float().unflatten(1, (self.scale.shape[1], -1))
        return groups.sub_(self.zero.float().unsqueeze(-1)).mul_(self.scale.float().unsqueeze(-1)).flatten(1)

    def stored(self, name: str, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return packed codes, scales and zero points as the MiLo format has them, after comparing all weights.

        Args:
            name: of the tensor with the scales, for messages.
            group_size: of the MiLo format; divides that of the source, whose scales are repeated.

        Raises:
            ConversionError: a scale is no positive fp16 number, or a weight would not be the same.
        """
        half = self.scale.half()
        if not bool(torch.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise ConversionError(f"{name}: holds scales that are not positive and finite, which MiLo does not have")
        if not torch.equal(half.to(self.scale.dtype), self.scale):
            raise ConversionError(
                f"{name}: its {str(self.scale.dtype).removeprefix('torch.')} scales are not all fp16 numbers, so the "
                f"matrix cannot be kept as it is; quantize the original with `milo quantize`"
            )
        times = self.codes.shape[1] // self.scale.shape[1] // group_size
        scale, zero = (part.repeat_interleave(times, 1) for part in (half, self.zero.half()))
        packed = pack_codes(self.codes)
        if not torch.equal(dequantize(packed, scale, zero, group_size), self.weights()):
            raise ConversionError(f"{name}: the weights would not be the same; report this, with the model")
        return packed, scale, zero


class Format(Protocol):
    """How another tool stores quantized matrices.

    Attributes:
        title: what it is called.
        needed: last names of the tensors that every quantized matrix has.
        leaves: of all that it may have.
    """

    title: str
    needed: tuple[str, ...]
    leaves: tuple[str, ...]

    def size(self, module: str, entries: Mapping[str, TensorEntry], load: Load) -> Size:
        """Return the size of a matrix by the headers of its tensors, by last name.

        Raises:
            ConversionError: they are not those of a 3-bit matrix.
        """

    def read(self, module: str, tensors: Mapping[str, torch.Tensor], size: Size) -> Grid:
        """Return a matrix by its tensors, by last name.

        Raises:
            ConversionError: MiLo has no such thing.
        """


def refuse_order(name: str, groups: torch.Tensor, size: Size) -> None:
    """Refuse inputs that are not in the order of their groups, as activation order leaves them.

    Args:
        name: of the tensor.
        groups: of each input, [K].
        size: of the matrix.

    Raises:
        ConversionError: names the tensor.
    """
    if not torch.equal(groups.long(), torch.arange(size.k) // (size.k // size.groups)):
        raise ConversionError(
            f"{name}: the inputs are not in the order of their groups (desc_act, activation order), which MiLo does "
            f"not have; quantize the original with `milo quantize`"
        )


def require(config: Mapping[str, Any], key: str, allowed: tuple[object, ...], what: str) -> None:
    """Refuse a source whose ``quantization_config`` states what is not imported; a key that is missing is allowed.

    Raises:
        ConversionError: names the key, and what is allowed.
    """
    value = config.get(key, allowed[0])
    if value not in allowed:
        raise ConversionError(
            f"{what}.{key} is {value!r}; `milo import` takes {' or '.join(map(repr, allowed))}: quantize the original "
            f"with `milo quantize`"
        )


def require_shape(name: str, entry: TensorEntry, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another dtype or shape.

    Raises:
        ConversionError: names the tensor, expected and found.
    """
    if entry.dtype not in dtypes or entry.shape != shape:
        raise ConversionError(
            f"{entry.file}: {name}: expected {' or '.join(dtypes)} {list(shape)} of a 3-bit matrix, found "
            f"{entry.dtype} {list(entry.shape)}"
        )
