"""The kernel of V·x."""

from __future__ import annotations

import triton
import triton.language as tl

from ..blocks import block_expert, load_pairs, rows_of
from ..gemm.dequant import (
    WARPGROUP_TOKENS,
    add_group,
    code_operand,
    finished,
    operand_order,
    scale_and_zero,
    scaled,
)
from ..gemm.lanes import load_lanes
from ..gemm.products import load_halves


@triton.jit
def _down_project(
    activations, factor, K, num_rows, expert, rows, valid, tile, split, unit_chunk, TILE: tl.constexpr
):  # fmt: skip
    """V·x of a tile of an expert's ranks over ``unit_chunk`` units of K, fp32 [RANKS, BLOCK_M]."""
    PARTS: tl.constexpr = TILE.PARTS
    RANKS: tl.constexpr = TILE.RANKS
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BF16: tl.constexpr = TILE.BF16
    ASM: tl.constexpr = TILE.ASM
    units = (K + 127) // 128
    begin = split * unit_chunk
    end = tl.minimum(begin + unit_chunk, units)
    rank = tl.arange(0, RANKS)  # divided where it is known, when compiled
    block = tl.load(factor.rank_blocks + expert * PARTS) + tile * (RANKS // 16) + rank // 16
    in_block = rank % 16
    in_rank = block < tl.load(factor.rank_blocks + expert * PARTS + PARTS)
    WARP: tl.constexpr = (TILE.WARP_MMA or BLOCK_M < WARPGROUP_TOKENS) and TILE.FACTOR_BITS == 3
    k64 = operand_order(64, WARP)
    lane = tl.arange(0, 4)
    first_unit = block.to(tl.int64) * units + begin
    scales = factor.v_scale + first_unit * 16 + in_block
    words = factor.v + (first_unit * 192 + in_block * 4)[:, None] + lane[None, :]
    row = block.to(tl.int64) * 16 + in_block
    values = factor.v + ((row * units + begin) * 128)[:, None] + k64[None, :]
    word_mask = in_rank[:, None] & (lane >= 0)[None, :]
    if TILE.LANES:
        x_rows = activations.lanes + (rows.to(tl.int64) * units + begin) * 64
        places = begin.to(tl.int64) * num_rows + rows
        sums = activations.sums + (places * 2)[:, None] + tl.arange(0, 2)[None, :]
    else:
        x_rows = activations.x + rows[None, :].to(tl.int64) * K + begin * 128
    x_mask = valid[None, :] & (k64 >= 0)[:, None]
    down = tl.zeros((RANKS, BLOCK_M), tl.float32)
    for unit in tl.range(begin, end, num_stages=TILE.STAGES):
        if TILE.LANES:
            x0, x1 = load_lanes(x_rows, valid, activations.x.dtype.element_ty, BLOCK_M)
            sum0, sum1 = tl.split(tl.load(sums))
            sums += num_rows * 2
        else:
            x0, x1 = load_halves(x_rows, x_mask, unit, K, WARP, TILE.EVEN_K)
        # fp16 scales of both halves, joined like a scale and a zero point
        scale0, scale1 = scale_and_zero(tl.load(scales, mask=in_rank, other=0))
        if TILE.FACTOR_BITS == 3:
            w0 = tl.load(words, mask=word_mask, other=0)
            w1 = tl.load(words + 64, mask=word_mask, other=0)
            w2 = tl.load(words + 128, mask=word_mask, other=0)
            four = tl.full((RANKS,), 4.0, tl.float32)
            wide: tl.constexpr = BF16 and not TILE.LANES
            codes0 = code_operand(w0, w1, w2, 0, BF16, wide, ASM, WARP, RANKS)
            codes1 = code_operand(w0, w1, w2, 1, BF16, wide, ASM, WARP, RANKS)
            if TILE.LANES:  # as in the GEMM, few tokens are scaled more cheaply than factors
                down = add_group(down, tl.dot(codes0, x0), sum0, scale0, four, 0, BF16)
                down = add_group(down, tl.dot(codes1, x1), sum1, scale1, four, 1, BF16)
            else:
                down = tl.dot(scaled(codes0, scale0, four, 0, BF16), x0, down)
                down = finished(tl.dot(scaled(codes1, scale1, four, 1, BF16), x1, down), ASM)
        else:
            v0 = tl.load(values, mask=in_rank[:, None], other=0).to(tl.float32) * scale0[:, None]
            v1 = tl.load(values + 64, mask=in_rank[:, None], other=0).to(tl.float32) * scale1[:, None]
            down = tl.dot(v0.to(x0.dtype), x0, down)
            down = finished(tl.dot(v1.to(x1.dtype), x1, down), ASM)
        x_rows += 64 if TILE.LANES else 128
        scales += 16
        words += 192
        values += 128
    return down


@triton.jit
def _finish(
    result, counter_ptr, own, place, inside, split, splits, part_size, RANKS: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Store ``own``, fp32 [RANKS, BLOCK_M], as one of ``splits`` parts; store their sum if it is the last of them.

    ``place`` [RANKS, BLOCK_M] is that in each part and in the sum. The parts are added in their order, all of them as
    memory has them, so that the same input gives the same bits whichever is last. :mod:`..protocol` says why in this
    order, with a barrier and ``.cg``.
    """
    parts_ptr = result.parts
    tl.store(parts_ptr + split * part_size + place, own, mask=inside)
    tl.debug_barrier()
    done = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    if done == splits - 1:
        down = tl.zeros((RANKS, BLOCK_M), tl.float32)
        for _ in tl.range(0, splits, loop_unroll_factor=128 // BLOCK_M):  # as many loads as registers have room for
            down += tl.load(parts_ptr + place, mask=inside, other=0.0, cache_modifier=".cg")
            parts_ptr += part_size
        tl.store(result.down + place, down.to(result.down.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["num_pairs", "num_rows", "top_k", "max_blocks", "unit_chunk", "splits", "rank_tiles"],
)
def project_kernel(
    activations, factor, result, blocks, K, num_pairs, num_rows, top_k, max_rank, max_blocks,
    unit_chunk, splits, rank_tiles, TILE: tl.constexpr,
):  # fmt: skip
    """V·x of BLOCK_M pairs, RANKS ranks and ``unit_chunk`` units of K.

    The parameters are those of :mod:`.arguments` and, as ``activations`` and ``blocks``,
    :class:`..gemm.arguments.Activations` (sums and lanes only with LANES) and :class:`..blocks.Blocks`; ``max_blocks``
    are blocks of the GEMM, ``max_rank`` the ranks of a row of the result, and the last three those of
    :class:`.plan.Plan`.
    Its step in :mod:`..protocol` is ``PROJECT``.
    """
    if TILE.PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    kind: tl.constexpr = TILE.BLOCKS
    block_m: tl.constexpr = TILE.BLOCK_M
    split, tile, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    expert = block_expert(blocks, block // TILE.SUB_BLOCKS, max_blocks, TILE.HAS_MAP, kind)
    pairs = load_pairs(blocks, block, num_pairs, max_blocks * TILE.SUB_BLOCKS, block_m, kind)
    if expert >= 0:
        rows, valid = rows_of(pairs, num_pairs, top_k, TILE.SHARED_ROWS)
        slot = tile * TILE.RANKS + tl.arange(0, TILE.RANKS)
        own = _down_project(
            activations, factor, K, num_rows, expert, rows, valid, tile, split, unit_chunk, TILE
        )  # fmt: skip
        place = pairs[None, :].to(tl.int64) * max_rank + slot[:, None]
        inside = valid[None, :] & (slot < max_rank)[:, None]
        part_size = tl.cast(num_pairs, tl.int64) * max_rank
        if TILE.FINISH:
            counter_ptr = result.counters + block * rank_tiles + tile
            _finish(
                result, counter_ptr, own, place, inside, split, splits, part_size, TILE.RANKS, block_m
            )  # fmt: skip
        else:
            tl.store(result.down + split * part_size + place, own.to(result.down.dtype.element_ty), mask=inside)
