"""Codes, scales and zero points of all experts of a GEMM in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...launch import LaunchMode, launch
from ...sizes import cdiv
from ..layout import ROW_BLOCK, UNIT
from .units import repack_unit

PLAIN = LaunchMode(asm=False, early=False)


@triton.jit(do_not_specialize=["rows", "num_words", "num_groups", "units", "blocks"])
def repack_base_kernel(
    packed_out_ptr, joined_out_ptr, packed_ptr, scale_ptr, zero_ptr, exponents_ptr, table_ptr,
    rows, num_words, num_groups, units, blocks,
    GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Bring over a unit of a block of ROWS rows of an expert, with the GROUPS scales and zero points of each row."""
    program = tl.program_id(0)
    unit = program % units
    block = program // units % blocks
    expert = (program // units // blocks).to(tl.int64)
    row = tl.arange(0, ROWS)
    valid = row < tl.load(table_ptr + 2 * block + 1)
    source = expert * rows + tl.load(table_ptr + 2 * block) + row
    target = (expert * units + unit) * blocks + block
    place = packed_out_ptr + target * (ROWS * 12)
    repack_unit(place, packed_ptr + source * num_words, unit, num_words, 0, valid, 0, ROWS)
    group = tl.arange(0, GROUPS)
    here = source[:, None] * num_groups + unit * GROUPS + group[None, :]
    there = valid[:, None] & (unit * GROUPS + group < num_groups)[None, :]
    power = ((127 + tl.load(exponents_ptr + expert)) << 23).to(tl.float32, bitcast=True)
    raised = (tl.load(scale_ptr + here, mask=there, other=0.0).to(tl.float32) * power).to(tl.float16)
    scale = raised.to(tl.int16, bitcast=True).to(tl.int32)
    zero = tl.load(zero_ptr + here, mask=there, other=0).to(tl.int32)
    joined = joined_out_ptr + (target * ROWS + row)[:, None] * GROUPS + group[None, :]
    tl.store(joined, (scale & 0xFFFF) | (zero << 16))


def repack_base(
    packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, exponents: torch.Tensor, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``packed`` and ``scale_zero`` of :class:`..layout.KernelWeights`.

    Args:
        packed: int32 [E, N, 3K/32], contiguous.
        scale: fp16 [E, N, K/g], contiguous.
        zero: likewise.
        exponents: of :func:`..layout.scale_exponents`.
        table: of :func:`.tables.row_table`.
    """
    experts, rows, words = packed.shape
    columns, num_groups, blocks = words * 32 // 3, scale.shape[2], len(table)
    units, groups = cdiv(columns, UNIT), UNIT * num_groups // columns
    out = packed.new_empty(experts, units, blocks, 3, ROW_BLOCK, 4)
    joined = packed.new_empty(experts, units, blocks * ROW_BLOCK, groups)
    launch(
        repack_base_kernel,
        (experts * blocks * units,),
        PLAIN,
        out,
        joined,
        packed,
        scale,
        zero.view(torch.int16),
        exponents,
        table,
        rows,
        words,
        num_groups,
        units,
        blocks,
        GROUPS=groups,
        ROWS=ROW_BLOCK,
        num_warps=4,
    )
    return out, joined
