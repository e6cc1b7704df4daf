"""One group of columns of a base with error feedback, for the converter on GPUs.

Column by column: the nearest code on the row's grid, then its error times a row of the factor off the columns to come.
A program holds some rows of the group in registers, where the same in torch takes four launches a column.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import device_of
from ..packing import MAX_CODE
from ..sizes import cdiv
from .grid_fit import nearest_code

_ROWS = 32
_WARPS = 4


def quantize_group(
    group: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    """Choose the codes of one group; return the scaled errors, float32 [B, N, g], for later columns.

    Args:
        group: the group's weights as they stand, float32 [B, N, g], contiguous along g.
        factor: the group's block of the feedback factor, upper triangular, float32 [B, g, g] or [1, g, g].
        scale: float32 [B, N].
        zero: float32 [B, N], real-valued.
        codes: uint8 [B, N, g], contiguous along g; overwritten.
    """
    batch, rows, size = group.shape
    errors = torch.empty(batch, rows, size, dtype=torch.float32, device=group.device)
    grid = (cdiv(rows, _ROWS), batch)
    with device_of(group):
        _feed_back[grid](
            group,
            factor,
            scale.contiguous(),
            zero.contiguous(),
            codes,
            errors,
            rows,
            group.stride(0),
            group.stride(1),
            factor.stride(0) if len(factor) > 1 else 0,
            factor.stride(1),
            factor.stride(2),
            codes.stride(0),
            codes.stride(1),
            GROUP=size,
            ROWS=_ROWS,
            LAST=MAX_CODE,
            num_warps=_WARPS,
        )
    return errors


@triton.jit
def _feed_back(
    group,
    factor,
    scales,
    zeros,
    codes,
    errors,
    rows,
    group_batch,
    group_row,
    factor_batch,
    factor_row,
    factor_column,
    codes_batch,
    codes_row,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    LAST: tl.constexpr,
):
    matrix = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, GROUP)
    inside = row < rows
    mask = inside[:, None]
    scale = tl.load(scales + matrix * rows + row, mask=inside, other=1.0)
    zero = tl.load(zeros + matrix * rows + row, mask=inside, other=0.0)
    places = group + matrix * group_batch + row.to(tl.int64)[:, None] * group_row + column[None, :]
    # in steps of the grid a code is one rounding; columns that are done hold their codes
    left = zero[:, None] + tl.load(places, mask=mask, other=0.0) / scale[:, None]
    fed = tl.zeros((ROWS, GROUP), tl.float32)
    factor += matrix * factor_batch
    for j in range(GROUP):
        here = column[None, :] == j
        value = tl.sum(tl.where(here, left, 0.0), 1)
        code = nearest_code(value, LAST)
        diagonal = tl.load(factor + j * (factor_row + factor_column))
        spread = tl.load(factor + j * factor_row + column * factor_column, mask=column > j, other=0.0) / diagonal
        error = value - code
        left = tl.where(here, code[:, None], left - error[:, None] * spread[None, :])
        fed = tl.where(here, (error * scale / diagonal)[:, None], fed)
    places = codes + matrix * codes_batch + row.to(tl.int64)[:, None] * codes_row + column[None, :]
    tl.store(places, left.to(tl.uint8), mask=mask)
    places = errors + (matrix * rows + row.to(tl.int64))[:, None] * GROUP + column[None, :]
    tl.store(places, fed, mask=mask)
