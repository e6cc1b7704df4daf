"""One matrix that is stored with fewer than 16 bits a weight: where its tensors lie, what they hold, and its values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ...errors import ConversionError
from ..layers import BROKEN
from .scheme import Scheme


class Place(NamedTuple):
    """A tensor in a file; of one that holds matrices of all experts, some rows of one expert's."""

    file: Path
    tensor: str
    expert: int | None = None
    rows: slice = slice(None)

    def __str__(self) -> str:
        return f"{self.file}: tensor {self.tensor}"


class Encoding(NamedTuple):
    """How a matrix is stored.

    Attributes:
        scheme: what makes values of its tensors.
        shape: of the matrix, [N, K].
        dtype: that its values get, by torch's name.
        places: of its tensors, by the last part of their names.
    """

    scheme: Scheme
    shape: tuple[int, int]
    dtype: str
    places: Mapping[str, Place]

    def read(self, load: Callable[[Place], torch.Tensor]) -> Encoded:
        """Return the matrix as it is stored, on the CPU.

        Args:
            load: returns a tensor of a file.

        Raises:
            ConversionError: scales that are zero, NaN or infinite, another shape, or columns in another order; names
                the file and the tensor.
        """
        tensors = {leaf: _exponents(load(place)) for leaf, place in self.places.items()}
        self._check_scales(tensors)
        self._check_shape(tensors)
        self._check_order(tensors)
        return Encoded(self, tensors)

    def _check_scales(self, tensors: Mapping[str, torch.Tensor]) -> None:
        leaf = self.scheme.format.scale
        scale = tensors[leaf]
        if scale.is_floating_point():
            broken = not torch.stack(scale.aminmax()).isfinite().all()
            what = "NaN or Inf" if broken else "0" if (scale == 0).any() else None
        else:
            what = "NaN" if (scale == torch.iinfo(scale.dtype).max).any() else None  # e8m0 has no zero, and no infinity
        if what is not None:
            raise ConversionError(f"{self.places[leaf]} holds a scale that is {what}; {BROKEN}")

    def _check_shape(self, tensors: Mapping[str, torch.Tensor]) -> None:
        leaf = self.scheme.format.shape
        if leaf is None:
            return
        found = tensors[leaf].tolist()
        if found != list(self.shape):
            codes = self.scheme.format.codes
            raise ConversionError(
                f"{self.places[leaf]} says {found}, but {self.places[codes].tensor} holds {list(self.shape)} weights; "
                f"rows that do not fill their last int32 are not read: convert a copy in 16 bits"
            )

    def _check_order(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Refuse columns that are not in the order of their groups, as GPTQ may leave them."""
        leaf = self.scheme.format.order
        if leaf is None or leaf not in tensors:
            return
        groups, size = tensors[leaf], self.scheme.block[1] or self.shape[1]
        if (groups != -1).all() and not torch.equal(groups.long(), torch.arange(self.shape[1]) // size):
            raise ConversionError(
                f"{self.places[leaf]}: the columns are not in the order of their groups (actorder group), which is not "
                f"read; convert a copy in 16 bits"
            )


class Encoded(NamedTuple):
    """A matrix as it is stored, its tensors in memory or in files that are read when they are used."""

    encoding: Encoding
    tensors: Mapping[str, torch.Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of the matrix, [N, K]."""
        return self.encoding.shape

    def in_memory(self, pinned: bool) -> Encoded:
        """Return it with all that its values take read from the disk, for a GPU into memory that is not paged."""
        scheme = self.encoding.scheme.format
        used = {leaf: tensor for leaf, tensor in self.tensors.items() if leaf not in (scheme.shape, scheme.order)}
        return self._replace(tensors={leaf: _read(tensor, pinned) for leaf, tensor in used.items()})

    def dequantize(self, device: torch.device) -> torch.Tensor:
        """Return the values [N, K] in the model's dtype, worked out on ``device``."""
        scheme = self.encoding.scheme
        values = scheme.format.dequantize({leaf: tensor.to(device) for leaf, tensor in self.tensors.items()}, scheme)
        scale = self.tensors[scheme.format.scale]
        if scheme.format.rounded and scale.is_floating_point():
            values = values.to(scale.dtype)
        return values.to(getattr(torch, self.encoding.dtype))


def _exponents(tensor: torch.Tensor) -> torch.Tensor:
    """Return powers of two (e8m0), of which torch computes hardly anything, as their exponents, uint8; others as is."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e8m0fnu else tensor


def _read(tensor: torch.Tensor, pinned: bool) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned).copy_(tensor)
