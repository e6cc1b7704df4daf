"""Sizes that fill no tile: tensor parallelism leaves a process N and K of a matrix that are no multiples of 64.

The kernels know multiples of 64 alone. Weights are padded to them when they are prepared, with rows and columns of
zeros; between the two GEMMs of a MoE layer nothing else is needed. Only what comes in and goes out of a layer with such
a size is copied, which costs the usual sizes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from ..sizes import cdiv

MULTIPLE = 64
"""N of every part and K of a GEMM, as the kernels see them, are multiples of this."""


def padded(size: int) -> int:
    """Return the next multiple of 64, which is the size itself where it is one."""
    return cdiv(size, MULTIPLE) * MULTIPLE


def pad_inputs(x: torch.Tensor) -> torch.Tensor:
    """Return activations [rows, K] with zeros up to a multiple of 64 columns; x itself where K is one."""
    missing = padded(x.shape[-1]) - x.shape[-1]
    return pad(x, (0, missing)) if missing else x


def cut_outputs(y: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """Return the outputs of all parts, [.., sum(widths)], from those of padded parts; y itself where none is padded."""
    wide = [padded(width) for width in widths]
    if wide == list(widths):
        return y
    parts = zip(y.split(wide, dim=-1), widths, strict=True)
    return torch.cat([part[..., :width] for part, width in parts], dim=-1)


def pad_rows(matrix: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """Return a matrix [.., N, C], each part of whose rows is padded with zeros to a multiple of 64."""
    if all(width == padded(width) for width in widths):
        return matrix
    parts = zip(matrix.split(list(widths), dim=-2), widths, strict=True)
    return torch.cat([pad(part, (0, 0, 0, padded(width) - width)) for part, width in parts], dim=-2)


def check_factors(widths: Sequence[int], ranks: Sequence[int], k: int, factor_bits: int) -> None:
    """Refuse factors in integers that have no scale for some of their values.

    Args:
        widths: outputs of each part.
        ranks: of each part.
        k: inputs.
        factor_bits: 3, 8 or 16.

    Raises:
        ValueError: a part has a compensator of 3 or 8 bits, and its outputs or inputs are no multiple of 64.
    """
    if factor_bits == 16:
        return
    for width, rank in zip(widths, ranks, strict=True):
        if rank and (width % MULTIPLE or k % MULTIPLE):
            raise ValueError(
                f"factors of {factor_bits} bits have a scale for {MULTIPLE} values, so a part of rank {rank} must have "
                f"multiples of {MULTIPLE} outputs and inputs; found {width} and {k}"
            )
