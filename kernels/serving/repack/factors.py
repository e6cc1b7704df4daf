"""Compensators of all experts of a GEMM, whatever their ranks: one launch for U, and one for V."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ...launch import launch
from ...packing import FACTOR_ZERO
from ...sizes import cdiv
from ...weights import RANK_BLOCK
from ..layout import ROW_BLOCK, UNIT
from ..padding import padded
from .base import PLAIN
from .units import load_codes, repack_unit

ZERO_CODE = tl.constexpr(FACTOR_ZERO)
EIGHT_ZEROS = tl.constexpr(sum(FACTOR_ZERO << 3 * code for code in range(8)))
"""Eight codes that stand for 0."""
ONE = tl.constexpr(0x3C00)
"""The bits of 1 in fp16: the scale of factors that have none."""
FIELDS = tl.constexpr(6)


@triton.jit
def _load_scale(scale_ptr, place, there, BITS: tl.constexpr):
    """Load the bits of scales; those of values in 16 bits are 1, and 0 where there is no value."""
    if BITS == 16:
        bits = tl.where(there, ONE, 0)
    else:
        bits = tl.load(scale_ptr + place, mask=there, other=0).to(tl.int32) & 0xFFFF
    return bits


@triton.jit(do_not_specialize=["columns", "num_words", "num_halves", "units"])
def repack_down_kernel(
    v_out_ptr, scale_out_ptr, v_ptr, scale_ptr, table_ptr, columns, num_words, num_halves, units,
    BITS: tl.constexpr,
):  # fmt: skip
    """Bring over a unit of a block of 16 ranks of V, with the scales of its two halves in a word."""
    program = tl.program_id(0)
    unit = program % units
    block = (program // units).to(tl.int64)
    rank = tl.arange(0, 16)
    valid = rank < tl.load(table_ptr + block * FIELDS + 1)
    row = tl.load(table_ptr + block * FIELDS) + rank
    target = block * units + unit
    if BITS == 3:
        source = v_ptr + row * num_words
        repack_unit(v_out_ptr + target * 192, source, unit, num_words, columns, valid, EIGHT_ZEROS, 16)
    else:
        k = unit * 128 + tl.arange(0, 128)
        there = valid[:, None] & (k < columns)[None, :]
        value = tl.load(v_ptr + row[:, None] * columns + k[None, :], mask=there, other=0)
        tl.store(v_out_ptr + (block * 16 + rank)[:, None] * (units * 128) + k[None, :], value)
    half = unit * 2
    first = _load_scale(scale_ptr, row * num_halves + half, valid & (half < num_halves), BITS)
    second = _load_scale(scale_ptr, row * num_halves + half + 1, valid & (half + 1 < num_halves), BITS)
    tl.store(scale_out_ptr + target * 16 + rank, first | (second << 16))


@triton.jit(do_not_specialize=["blocks"])
def repack_up_kernel(
    u_out_ptr, scale_out_ptr, u_ptr, scale_ptr, table_ptr, blocks,
    BITS: tl.constexpr,
):  # fmt: skip
    """Bring over 64 columns of a block of 16 ranks of U, with a scale for each rank."""
    program = tl.program_id(0)
    own = program % blocks
    entry = table_ptr + (program // blocks).to(tl.int64) * FIELDS
    count = tl.load(entry + 1)
    width = tl.load(entry + 2)
    if own * 64 < width:
        start = tl.load(entry + 3)
        first_column = tl.load(entry + 5)
        column = own * 64 + tl.arange(0, 64)
        target = (first_column + column)[:, None]
        rank = tl.arange(0, 16)
        if BITS == 3:
            lane = tl.arange(0, 4)
            word = tl.zeros((64, 4), tl.int32)
            for half in tl.static_range(2):
                for low in tl.static_range(2):
                    own_rank = (8 * half + 2 * lane + low)[None, :]
                    there = (own_rank < count) & (column < width)[:, None]
                    row = u_ptr + start + own_rank * (3 * width // 32)
                    code = tl.where(there, load_codes(row, column[:, None], there), ZERO_CODE)
                    word |= code << (4 * (2 * half + low))
            tl.store(u_out_ptr + target * 4 + lane[None, :], word.to(tl.int16))
        else:
            there = (rank < count)[None, :] & (column < width)[:, None]
            value = tl.load(u_ptr + start + rank[None, :] * width + column[:, None], mask=there, other=0)
            tl.store(u_out_ptr + target * 16 + rank[None, :], value)
        place = tl.load(entry + 4) + rank * (width // 64) + own
        scale = _load_scale(scale_ptr, place, rank < count, BITS)
        tl.store(scale_out_ptr + first_column // 4 + own * 16 + rank, scale.to(tl.int16))


def _as_integers(values: torch.Tensor) -> torch.Tensor:
    """Return 16-bit values as integers, which are copied whatever they stand for."""
    return values.view(torch.int16) if values.element_size() == 2 else values


def repack_down(
    v: torch.Tensor, v_scale: torch.Tensor, table: torch.Tensor, columns: int, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``v`` and ``v_scale`` of :class:`..layout.KernelWeights`.

    Args:
        v: factors of all parts in the checkpoint layout, [R, ·], contiguous.
        v_scale: fp16 [R, K/64], contiguous; not read with 16 bits.
        table: of :func:`.tables.rank_table`.
        columns: K.
        bits: 3, 8 or 16.
    """
    units, blocks = cdiv(columns, UNIT), len(table)
    shape = (blocks, units, 3, RANK_BLOCK, 4) if bits == 3 else (blocks, RANK_BLOCK, units * UNIT)
    out = v.new_empty(shape if blocks or bits != 3 else (0,))
    scale = torch.empty(blocks, units, RANK_BLOCK, dtype=torch.int32, device=v.device)
    if blocks:
        launch(
            repack_down_kernel,
            (blocks * units,),
            PLAIN,
            _as_integers(out),
            scale,
            _as_integers(v),
            None if bits == 16 else v_scale.view(torch.int16),
            table,
            columns,
            v.shape[1],
            padded(columns) // 64,
            units,
            BITS=bits,
            num_warps=2,
        )
    return out, scale


def repack_up(
    u: torch.Tensor, u_scale: torch.Tensor, table: torch.Tensor, ranks: Sequence[int], widths: Sequence[int], bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``u`` and ``u_scale`` of :class:`..layout.KernelWeights`.

    Args:
        u: factors of all parts in the checkpoint layout, one after another, contiguous.
        u_scale: fp16, likewise; not read with 16 bits.
        table: of :func:`.tables.rank_table`.
        ranks: of each part of each expert.
        widths: outputs of each.
        bits: 3, 8 or 16.
    """
    columns = sum(cdiv(rank, RANK_BLOCK) * padded(width) for rank, width in zip(ranks, widths, strict=True))
    dtype = torch.int16 if bits == 3 else u.dtype
    out = torch.empty(columns * (4 if bits == 3 else RANK_BLOCK), dtype=dtype, device=u.device)
    scale = torch.empty(columns // ROW_BLOCK * RANK_BLOCK, dtype=torch.float16, device=u.device)
    blocks = padded(max(widths)) // ROW_BLOCK
    if len(table):
        launch(
            repack_up_kernel,
            (len(table) * blocks,),
            PLAIN,
            _as_integers(out),
            scale.view(torch.int16),
            _as_integers(u),
            None if bits == 16 else u_scale.view(torch.int16),
            table,
            blocks,
            BITS=bits,
            num_warps=2,
        )
    return out, scale
