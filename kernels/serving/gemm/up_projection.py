"""The compensators' up-projection, which a tile adds to its sums: Uᵀ·(V·x)."""

from __future__ import annotations

import triton
import triton.language as tl

from .dequant import WARPGROUP_TOKENS, finished, operand_order
from .up_factor import Columns, factor, few_factor, next_scales, part_ranks

FEW_TOKENS = tl.constexpr(32)
"""Most tokens of a tile that takes :func:`_add_few`: more make V·x the larger of both operands."""


@triton.jit
def _few_scale(
    u_scale_ptr, ranks, rank_block, columns,
    GROUP: tl.constexpr, WARP: tl.constexpr, BLOCK_M: tl.constexpr, RANK_STEP: tl.constexpr,
):  # fmt: skip
    """Scales of RANK_STEP ranks and one of the tile's groups of 64 columns, fp32 [RANK_STEP, BLOCK_M] as V·x is."""
    groups = columns.width // 64
    group = columns.first // 64 + GROUP
    order = operand_order(RANK_STEP, WARP)
    place = (order // 16 * (groups * 16) + order % 16)[:, None] + tl.zeros((1, BLOCK_M), tl.int32)
    known = (rank_block + order // 16 < ranks.blocks)[:, None] & (group < groups) & (place >= 0)
    first = ranks.start + (rank_block * groups + group).to(tl.int64) * 16
    return tl.load(u_scale_ptr + first + place, mask=known, other=0.0).to(tl.float32)


@triton.jit
def _few_down(
    compensators, ranks, rank_block, counts, pairs, valid,
    dtype: tl.constexpr, WARP: tl.constexpr, TILE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """V·x of RANK_STEP ranks in fp32 [RANK_STEP, BLOCK_M], parts added before they go to where an MMA wants them."""
    down = _load_down(
        compensators.down, ranks, rank_block, counts, pairs, valid,
        TILE.DOWN_SPLITS, dtype, WARP, BLOCK_M, TILE.RANK_STEP,
    )  # fmt: skip
    return finished(down.to(tl.float32), TILE.ASM)


@triton.jit
def _add_few(
    acc, compensators, ranks, columns, counts, pairs, valid, begin, end,
    dtype: tl.constexpr, TILE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """acc += Uᵀ·(V·x) of the blocks of 16 ranks from ``begin`` to ``end``, U in 3 bits, for few tokens.

    A tile of few tokens has more of U than of V·x. So the scales go to V·x, with a product for each group of 64
    columns, and U's codes are multiplied as they are: U is not rounded, and a thread loads the scales of few ranks.
    Rows of another group are dropped by a choice that the compiler makes, where a warp's rows are all of one group.
    """
    BF16: tl.constexpr = dtype == tl.bfloat16
    WARP: tl.constexpr = TILE.WARP_MMA or BLOCK_M < WARPGROUP_TOKENS
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    RANK_STEP: tl.constexpr = TILE.RANK_STEP
    GROUPS: tl.constexpr = BLOCK_N // 64
    step: tl.constexpr = RANK_STEP // 16
    one: tl.constexpr = 1.0 if BF16 else 16.0  # what _few_codes takes off, so that fp16 holds small products too
    for block in tl.range(begin, end, step, num_stages=1):  # loads of a turn are issued at once, and that is enough
        down = _few_down(compensators, ranks, block, counts, pairs, valid, dtype, WARP, TILE, BLOCK_M)
        first = _few_scale(compensators.u_scale, ranks, block, columns, 0, WARP, BLOCK_M, RANK_STEP)
        second = first
        if GROUPS == 2:
            second = _few_scale(compensators.u_scale, ranks, block, columns, 1, WARP, BLOCK_M, RANK_STEP)
        codes = few_factor(compensators, ranks, block, columns, BF16, WARP, TILE)
        product = tl.dot(codes, (down * (first * one)).to(dtype))
        if GROUPS == 2:
            other = tl.dot(codes, (down * (second * one)).to(dtype))
            product = tl.where((tl.arange(0, BLOCK_N) < 64)[:, None], product, other)
        acc += product
    return finished(acc, TILE.ASM)


@triton.jit
def _load_down(
    down_ptr, ranks, rank_block, counts, pairs, valid,
    DOWN_SPLITS: tl.constexpr, dtype: tl.constexpr, WARP: tl.constexpr, BLOCK_M: tl.constexpr, RANK_STEP: tl.constexpr,
):  # fmt: skip
    """V·x of RANK_STEP ranks of a part, [RANK_STEP, BLOCK_M]."""
    lane = rank_block * 16 + operand_order(RANK_STEP, WARP)
    mask = valid[None, :] & (lane < ranks.blocks * 16)[:, None]
    place = down_ptr + pairs[None, :].to(tl.int64) * counts.max_rank + (ranks.before + lane)[:, None]
    if DOWN_SPLITS == 1:
        return tl.load(place, mask=mask, other=0.0).to(dtype)
    down = tl.zeros((RANK_STEP, BLOCK_M), tl.float32)
    for _ in tl.static_range(DOWN_SPLITS):
        down += tl.load(place, mask=mask, other=0.0)
        place += counts.num_pairs * counts.max_rank
    return down.to(dtype)


@triton.jit
def add_up_projection(
    acc, compensators, ranks, columns, counts, pairs, valid, split_index,
    dtype: tl.constexpr, TILE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """acc += Uᵀ·(V·x) for this tile, over this split's share of the blocks of 16 ranks of its part."""
    bits: tl.constexpr = TILE.FACTOR_BITS
    warp: tl.constexpr = TILE.WARP_MMA or BLOCK_M < WARPGROUP_TOKENS
    fast: tl.constexpr = bits == 3 and dtype == tl.float16 and not warp
    few: tl.constexpr = bits == 3 and BLOCK_M <= FEW_TOKENS and TILE.BLOCK_N <= 128
    rank_step: tl.constexpr = TILE.RANK_STEP
    step: tl.constexpr = rank_step // 16
    groups: tl.constexpr = TILE.BLOCK_N // 64
    stages: tl.constexpr = 2 if rank_step > 16 and TILE.DOWN_SPLITS == 1 else 1  # more splits have no room for two
    share = tl.cdiv(tl.cdiv(ranks.blocks, step), TILE.SPLIT_K) * step
    begin = split_index * share
    end = tl.minimum(begin + share, ranks.blocks)
    if few:
        return _add_few(acc, compensators, ranks, columns, counts, pairs, valid, begin, end, dtype, TILE, BLOCK_M)
    # in a loop of many turns scales are loaded a step ahead: Triton's pipeline takes no loads as narrow as these. Where
    # there are few, all that a turn wants is asked for at once.
    ahead: tl.constexpr = stages > 1 and not (fast and TILE.BLOCKS != "rows")
    scale = next_scales(compensators.u_scale, ranks, begin, columns, groups, fast, warp, TILE)
    for block in tl.range(begin, end, step, num_stages=stages):
        if ahead:
            next_scale = next_scales(compensators.u_scale, ranks, block + step, columns, groups, fast, warp, TILE)
        else:
            scale = next_scales(compensators.u_scale, ranks, block, columns, groups, fast, warp, TILE)
        u = factor(compensators.u, ranks, block, columns, scale, dtype, fast, warp, groups, TILE)
        if ahead:
            scale = next_scale
        down = _load_down(
            compensators.down, ranks, block, counts, pairs, valid, TILE.DOWN_SPLITS, dtype, warp, BLOCK_M, rank_step
        )  # fmt: skip
        acc = finished(tl.dot(u, down, acc), TILE.ASM)
    return acc


@triton.jit
def _gated_operands(
    compensators, ranks, block, columns, counts, pairs, valid, TILE: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Uᵀ of a part's ranks from ``block`` on, fp16 [BLOCK_N, RANK_STEP], 0 where not inside, and V·x for it."""
    bits: tl.constexpr = TILE.FACTOR_BITS
    warp: tl.constexpr = TILE.WARP_MMA or BLOCK_M < WARPGROUP_TOKENS
    fast: tl.constexpr = bits == 3 and not warp
    few: tl.constexpr = bits == 3 and BLOCK_M <= FEW_TOKENS and TILE.BLOCK_N == 128
    groups: tl.constexpr = TILE.BLOCK_N // 128 if TILE.BLOCK_N >= 128 else 1
    if few:  # as _add_few, of one group of 64 columns
        down = _few_down(compensators, ranks, block, counts, pairs, valid, tl.float16, warp, TILE, BLOCK_M)
        scale = _few_scale(compensators.u_scale, ranks, block, columns, 0, warp, BLOCK_M, TILE.RANK_STEP)
        down = (down * (scale * 16.0)).to(tl.float16)
        u = few_factor(compensators, ranks, block, columns, False, warp, TILE)
    else:
        down = _load_down(
            compensators.down, ranks, block, counts, pairs, valid,
            TILE.DOWN_SPLITS, tl.float16, warp, BLOCK_M, TILE.RANK_STEP,
        )  # fmt: skip
        scale = next_scales(compensators.u_scale, ranks, block, columns, groups, fast, warp, TILE)
        u = factor(compensators.u, ranks, block, columns, scale, tl.float16, fast, warp, groups, TILE)
    return u, down


@triton.jit
def add_gated_up_projection(
    acc, compensators, columns, is_up, counts, expert, pairs, valid, TILE: tl.constexpr, BLOCK_M: tl.constexpr
):
    """acc += Uᵀ·(V·x) where gate's columns and up's alternate, each with the other's read as 0.

    Were they set to 0 once they are read, they would go to the MMA through shared memory.
    """
    rank_step: tl.constexpr = TILE.RANK_STEP
    stages: tl.constexpr = 2 if rank_step > 16 and TILE.DOWN_SPLITS == 1 else 1  # more splits have no room for two
    gate, up = part_ranks(compensators, expert, 0, 2), part_ranks(compensators, expert, 1, 2)
    gates = Columns(columns.first, columns.each, columns.inside & (is_up == 0), columns.width)
    ups = Columns(columns.first, columns.each, columns.inside & is_up, columns.width)
    for block in tl.range(0, tl.maximum(gate.blocks, up.blocks), rank_step // 16, num_stages=stages):
        u, down = _gated_operands(compensators, gate, block, gates, counts, pairs, valid, TILE, BLOCK_M)
        acc = finished(tl.dot(u, down, acc), TILE.ASM)
        u, down = _gated_operands(compensators, up, block, ups, counts, pairs, valid, TILE, BLOCK_M)
        acc = finished(tl.dot(u, down, acc), TILE.ASM)
    return acc
