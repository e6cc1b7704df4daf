"""What comes before the V·x of a GEMM's input: the sort of the pairs and the sums of x over groups, in one launch.

The GEMM takes zero points off with the sums (see :mod:`.dequant`). Those of the second GEMM's input come with the
activation that makes it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import LaunchMode
from .layout import UNIT
from .routing import Routes, TokenBlocks, allocate_blocks, sort_expert, sort_sizes

SUM_ROWS = 16
"""Rows of x of one program."""


@triton.jit
def _store_sums(sums_ptr, x_ptr, row_block, unit, K, num_rows, SUM: tl.constexpr, ROWS: tl.constexpr):
    """Store the sums over SUM columns of one unit of ROWS rows of x."""
    rows = row_block * ROWS + tl.arange(0, ROWS)
    valid = rows < num_rows
    k = unit * 128 + tl.arange(0, 128)
    place = x_ptr + rows[:, None].to(tl.int64) * K + k[None, :]
    x = tl.load(place, mask=valid[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
    per_unit: tl.constexpr = 128 // SUM
    sums = tl.sum(tl.reshape(x, (ROWS, per_unit, SUM)), 2)
    target = sums_ptr + (unit * num_rows + rows.to(tl.int64))[:, None] * per_unit + tl.arange(0, per_unit)[None, :]
    tl.store(target, sums, mask=valid[:, None])


@triton.jit(do_not_specialize=["num_pairs", "num_rows", "num_experts", "sum_programs"])
def _prepare_kernel(
    x_ptr, sums_ptr, ids_ptr, map_ptr, pairs_ptr, experts_ptr, num_blocks_ptr,
    K, num_pairs, num_rows, num_experts, sum_programs,
    SUM: tl.constexpr, ROWS: tl.constexpr, HAS_MAP: tl.constexpr,
    SORT_M: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Two jobs that do not need each other: sums of x, and (SORT_M > 0) the sort into blocks of SORT_M."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    if program < sum_programs:
        units = (K + 127) // 128
        _store_sums(sums_ptr, x_ptr, program // units, program % units, K, num_rows, SUM, ROWS)
    elif SORT_M > 0:
        sort_expert(
            ids_ptr, map_ptr, pairs_ptr, experts_ptr, num_blocks_ptr, program - sum_programs,
            num_pairs, num_experts, HAS_MAP, SORT_M, BINS, CHUNK,
        )  # fmt: skip


def prepare(
    x: torch.Tensor,
    routes: Routes | None,
    num_experts: int,
    block_m: int,
    group_size: int,
    need_sums: bool,
    mode: LaunchMode,
) -> tuple[torch.Tensor, TokenBlocks]:
    """Return the sums of x and the pairs in blocks.

    Args:
        x: activations, fp16 or bf16 [rows, K], contiguous.
        routes: where the pairs go; None for a dense layer, whose pairs are its rows.
        num_experts: local experts.
        block_m: pairs of a block.
        group_size: 32, 64 or 128.
        need_sums: whether the GEMM wants the sums.
        mode: how to launch.

    Returns:
        Sums as in :class:`.project.Projected`, empty where not needed, and the blocks. A single token, each of whose
        pairs is a block, and a dense layer need no sort.
    """
    rows, k = x.shape
    units = triton.cdiv(k, UNIT)
    sum_size = min(group_size, 64)
    sums = torch.empty(units if need_sums else 0, rows, 128 // sum_size, dtype=torch.float32, device=x.device)
    if routes is None:
        num_pairs, blocks = rows, TokenBlocks(None, None, None, triton.cdiv(rows, block_m), block_m)
    else:
        num_pairs, blocks = routes.num_pairs, allocate_blocks(routes, num_experts, block_m)
    sort = blocks.pairs is not None
    bins, chunk = sort_sizes(num_experts, num_pairs) if sort else (1, 1)
    sum_programs = triton.cdiv(rows, SUM_ROWS) * units if need_sums else 0
    programs = sum_programs + (num_experts if sort else 0)
    if programs == 0:
        return sums, blocks
    _prepare_kernel[(programs,)](
        x,
        sums,
        None if routes is None else routes.ids,
        None if routes is None else routes.expert_map,
        blocks.pairs,
        blocks.experts,
        blocks.num_blocks,
        k,
        num_pairs,
        rows,
        num_experts,
        sum_programs,
        SUM=sum_size,
        ROWS=SUM_ROWS,
        HAS_MAP=routes is not None and routes.expert_map is not None,
        SORT_M=block_m if sort else 0,
        BINS=bins,
        CHUNK=chunk,
        PDL=mode.early,
        num_warps=8 if chunk > 1024 else 4,
        **mode.options(),
    )
    return sums, blocks
