"""The largest norm of a row of each part of each expert in one launch; :mod:`...bounds` says what for."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...launch import launch
from ...packing import FACTOR_ZERO
from ...sizes import cdiv
from ...weights import ExpertWeights
from ..layout import ROW_BLOCK
from .base import PLAIN
from .units import load_codes

ZERO_CODE = tl.constexpr(FACTOR_ZERO)
COLUMNS = 32


@triton.jit
def _load_factor(row_ptr, scale_ptr, column, there, BITS: tl.constexpr):
    """Load values of a factor, fp32. ``row_ptr`` and ``scale_ptr`` point to its rows."""
    if BITS == 16:
        value = tl.load(row_ptr + column, mask=there, other=0.0).to(tl.float32)
    else:
        value = tl.load(scale_ptr + column // 64, mask=there, other=0.0).to(tl.float32)
        if BITS == 8:
            value *= tl.load(row_ptr + column, mask=there, other=0).to(tl.float32)
        else:
            value *= load_codes(row_ptr, column, there).to(tl.float32) - ZERO_CODE
    return value


@triton.jit(do_not_specialize=["width", "columns", "blocks"])
def row_norms_kernel(
    out_ptr, packed_ptr, scale_ptr, zero_ptr, u_ptr, u_scale_ptr, v_ptr, v_scale_ptr, rank_offsets_ptr,
    width, columns, blocks,
    GROUP: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store the largest squared norm of a block of ROWS rows of a part of W + Uᵀ·V."""
    program = tl.program_id(0)
    part = (program // blocks).to(tl.int64)
    own_row = program % blocks * ROWS + tl.arange(0, ROWS)
    valid = own_row < width
    row = part * width + own_row
    first = tl.load(rank_offsets_ptr + part)
    stop = tl.load(rank_offsets_ptr + part + 1)
    # of one row of a factor: elements, and scales
    u_row = 3 * width // 32 if BITS == 3 else width
    v_row = 3 * columns // 32 if BITS == 3 else columns
    sums = tl.zeros((ROWS,), tl.float32)
    # columns come first, along which the lanes of a warp then lie: those of one row are side by side in memory
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        there = (column < columns)[:, None] & valid[None, :]
        codes = load_codes(packed_ptr + row[None, :] * (3 * columns // 32), column[:, None], there)
        group = (column // GROUP)[:, None] + row[None, :] * (columns // GROUP)
        zero = tl.load(zero_ptr + group, mask=there, other=0.0).to(tl.float32)
        weight = tl.load(scale_ptr + group, mask=there, other=0.0).to(tl.float32) * (codes.to(tl.float32) - zero)
        for block in range(first, stop, 16):
            rank = block + tl.arange(0, 16)
            inside = (rank < stop)[None, :]
            rank = rank.to(tl.int64)[None, :]
            u = _load_factor(
                u_ptr + rank * u_row, u_scale_ptr + rank * (width // 64), own_row[:, None],
                valid[:, None] & inside, BITS,
            )  # fmt: skip
            v = _load_factor(
                v_ptr + rank * v_row, v_scale_ptr + rank * (columns // 64), column[:, None],
                (column < columns)[:, None] & inside, BITS,
            )  # fmt: skip
            weight += tl.dot(v, tl.trans(u), input_precision="ieee")
        sums += tl.sum(weight * weight, 0)
    tl.store(out_ptr + program, tl.max(sums, 0))


def largest_row_norms(weights: ExpertWeights, factor_bits: int) -> torch.Tensor:
    """Return what :func:`...bounds.largest_row_norms` does, up to rounding, fp32 [E·P].

    Args:
        weights: one grouped GEMM, in the checkpoint layout, contiguous.
        factor_bits: 3, 8 or 16.
    """
    experts, rows, words = weights.packed.shape
    parts = len(weights.rank_offsets) - 1
    width = rows * experts // parts
    blocks = cdiv(width, ROW_BLOCK)
    largest = torch.empty(parts, blocks, dtype=torch.float32, device=weights.packed.device)
    launch(
        row_norms_kernel,
        (parts * blocks,),
        PLAIN,
        largest,
        *weights[:8],
        width,
        words * 32 // 3,
        blocks,
        GROUP=weights.group_size,
        BITS=factor_bits,
        ROWS=ROW_BLOCK,
        COLUMNS=COLUMNS,
        num_warps=4,
        num_stages=1,  # more take the registers
    )
    return largest.amax(1).sqrt()
