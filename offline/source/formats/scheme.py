"""What is told of a matrix that is stored with fewer than 16 bits a weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from vllm_milo.dtypes import DTYPES

Dequantize = Callable[[Mapping[str, torch.Tensor], "Scheme"], torch.Tensor]
"""Returns the values of a matrix, float32 [N, K], by its tensors, whose names are the last parts of theirs in files."""
FLOATS = ("F32", "BF16", "F16")


class Format(NamedTuple):
    """A way to store matrices.

    Attributes:
        name: for people.
        codes: last part of the name of the tensor with the weights, ``weight`` or ``weight_packed``, [N, …].
        dtypes: that it may have.
        scale: last part of the name of the tensor with the scales.
        scale_dtypes: that this may have.
        dequantize: what makes values of them.
        rounded: whether values are rounded to the scales' dtype before they get the model's, as compressed-tensors
            does.
        shape: last part of the name of a tensor that states the shape, int [2]; None where there is none.
        zero: last part of the name of the tensor with the zero points, where the scheme is not symmetric, or None.
        order: last part of the name of the tensor with each column's group, which may be there, or None.
    """

    name: str
    codes: str
    dtypes: tuple[str, ...]
    scale: str
    scale_dtypes: tuple[str, ...]
    dequantize: Dequantize
    rounded: bool = True
    shape: str | None = None
    zero: str | None = None
    order: str | None = None

    @property
    def leaves(self) -> tuple[str, ...]:
        """Return the last parts of the names of all tensors that a matrix may have."""
        further = (self.shape, self.zero, self.order)
        return (self.codes, self.scale, *(leaf for leaf in further if leaf is not None))


class Scheme(NamedTuple):
    """A format with its numbers.

    Attributes:
        format: the way to store matrices.
        block: rows and columns that share a scale; None for all of them.
        bits: of a weight.
        symmetric: whether there are no zero points.
        targets: which modules have it, where a model has several: names, ``re:`` and a pattern, or ``Linear`` for all.
    """

    format: Format
    block: tuple[int | None, int | None]
    bits: int = 8
    symmetric: bool = True
    targets: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return the format and what shares a scale, for people."""
        rows, columns = self.block
        if rows is None:
            shared = "a matrix"
        elif columns is None:
            shared = "a row"
        else:
            shared = f"{columns} weights of a row" if rows == 1 else f"{rows}x{columns} weights"
        zero = "" if self.symmetric else " and a zero point"
        return f"{self.format.name}, a scale{zero} for {shared}"

    def per_code(self, dtype: str) -> int:
        """Return how many weights are in one element of the codes, whose dtype safetensors calls ``dtype``."""
        return 8 * DTYPES[dtype].size // self.bits

    def scales(self, n: int, k: int) -> tuple[int, int]:
        """Return how many scales the rows and the columns of a matrix [N, K] have."""
        rows, columns = self.block
        return (1 if rows is None else math.ceil(n / rows)), (1 if columns is None else math.ceil(k / columns))
