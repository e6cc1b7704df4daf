"""The compensators' down-projection V·x, before the GEMM that adds Uᵀ to it in its epilogue.

Every tile of the GEMM needs all of V·x, so it cannot be computed inside; but only its epilogue does, so the GEMM's
loop over K runs at the same time where launches start early.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .dequant import code_operand, finished, scale_and_zero, scaled
from .launch import LaunchMode, launch
from .layout import UNIT, KernelWeights
from .routing import Routes, TokenBlocks, local_expert

RANKS = 64
"""Ranks of a program: fewer would not be multiplied by a whole warpgroup, and take as long."""


class Projected(NamedTuple):
    """Input of a GEMM.

    Attributes:
        x: activations, 16 bits, [rows, K].
        sums: fp32 [K/128, rows, 128/g'], sums of x over g' = min(group_size, 64) columns.
        down: V·x, fp32 [splits, pairs, ranks], to be added over splits, or in x's dtype where splits is 1; None
            where no expert has rank.
        row_scale: fp32 [rows]; x, sums and down are those of the activations divided by it. None for 1.
        norm: fp32 [rows], Euclidean norms of the activations, where the GEMM applies the activation.
    """

    x: torch.Tensor
    sums: torch.Tensor
    down: torch.Tensor | None
    row_scale: torch.Tensor | None = None
    norm: torch.Tensor | None = None


@triton.jit
def load_pairs(pairs_ptr, block, num_pairs, max_blocks, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr):
    """Pair indexes of a block, num_pairs where there is none; anything in blocks that are not in use.

    BLOCKS: "sorted" by expert; "single": block b is pair b alone; "rows": BLOCK_M consecutive rows.
    """
    lane = tl.arange(0, BLOCK_M)
    if BLOCKS == "sorted":
        return tl.load(pairs_ptr + block * BLOCK_M + lane, mask=lane < (max_blocks - block) * BLOCK_M, other=0)
    if BLOCKS == "single":
        return tl.where(lane == 0, block, num_pairs)
    return tl.minimum(block * BLOCK_M + lane, num_pairs)


@triton.jit
def last_pair(pairs_ptr, index, num_pairs, last_index, BLOCKS: tl.constexpr):
    """Whether no pair stands at ``index`` of the sorted pairs; within a block they stand in front."""
    if BLOCKS == "sorted":
        return tl.load(pairs_ptr + index, mask=index < last_index, other=0) >= num_pairs
    if BLOCKS == "single":
        return True
    return index >= num_pairs


@triton.jit
def block_expert(
    experts_ptr, num_blocks_ptr, ids_ptr, map_ptr, block, max_blocks, HAS_MAP: tl.constexpr, BLOCKS: tl.constexpr
):
    """Local expert of a block; -1 where the block is not in use.

    What is read does not depend on what was read: a tile's start is a chain of such waits.
    """
    exists = block < max_blocks
    if BLOCKS == "sorted":
        expert = tl.load(experts_ptr + block, mask=exists, other=-1)
        return tl.where(block < tl.load(num_blocks_ptr), expert, -1)
    if BLOCKS == "single":
        return local_expert(ids_ptr, map_ptr, block, exists, HAS_MAP)
    return tl.where(exists, 0, -1)


@triton.jit
def _down_project(
    x_ptr, v_ptr, v_scale_ptr, rank_blocks_ptr, down_ptr, expert, pairs, rows, first_slot, split, unit_chunk,
    K, num_pairs, max_rank, PARTS: tl.constexpr, FACTOR_BITS: tl.constexpr, RANKS: tl.constexpr,
    BF16: tl.constexpr, ASM: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """V·x of RANKS ranks of an expert, from ``first_slot``, over ``unit_chunk`` units of K."""
    valid = pairs < num_pairs
    units = (K + 127) // 128
    begin = split * unit_chunk
    end = tl.minimum(begin + unit_chunk, units)
    slot = first_slot + tl.arange(0, RANKS)
    row = tl.load(rank_blocks_ptr + expert * PARTS) * 16 + slot
    in_rank = row < tl.load(rank_blocks_ptr + expert * PARTS + PARTS) * 16
    k64 = tl.arange(0, 64)
    lane = tl.arange(0, 4)
    first_unit = (row // 16).to(tl.int64) * units + begin
    scales = v_scale_ptr + first_unit * 16 + row % 16
    words = v_ptr + (first_unit * 192 + row % 16 * 4)[:, None] + lane[None, :]
    values = v_ptr + ((row.to(tl.int64) * units + begin) * 128)[:, None] + k64[None, :]
    word_mask = in_rank[:, None] & (lane >= 0)[None, :]
    x_rows = x_ptr + rows[None, :].to(tl.int64) * K + begin * 128 + k64[:, None]
    x_mask = valid[None, :] & (k64 >= 0)[:, None]
    down = tl.zeros((RANKS, BLOCK_M), tl.float32)
    for unit in tl.range(begin, end, num_stages=STAGES):
        x0 = tl.load(x_rows, mask=x_mask, other=0.0)
        if EVEN_K:
            x1 = tl.load(x_rows + 64, mask=x_mask, other=0.0)
        else:
            x1 = tl.load(x_rows + 64, mask=x_mask & (unit * 128 + 64 < K), other=0.0)
        # fp16 scales of both halves, joined like a scale and a zero point
        scale0, scale1 = scale_and_zero(tl.load(scales, mask=in_rank, other=0))
        if FACTOR_BITS == 3:
            w0 = tl.load(words, mask=word_mask, other=0)
            w1 = tl.load(words + 64, mask=word_mask, other=0)
            w2 = tl.load(words + 128, mask=word_mask, other=0)
            four = tl.full((RANKS,), 4.0, tl.float32)
            codes0 = code_operand(w0, w1, w2, 0, BF16, BF16, ASM, RANKS)
            codes1 = code_operand(w0, w1, w2, 1, BF16, BF16, ASM, RANKS)
            down = tl.dot(scaled(codes0, scale0, four, 0, BF16), x0, down)
            down = finished(tl.dot(scaled(codes1, scale1, four, 1, BF16), x1, down), ASM)
        else:
            v0 = tl.load(values, mask=in_rank[:, None], other=0).to(tl.float32) * scale0[:, None]
            v1 = tl.load(values + 64, mask=in_rank[:, None], other=0).to(tl.float32) * scale1[:, None]
            down = tl.dot(v0.to(x0.dtype), x0, down)
            down = finished(tl.dot(v1.to(x1.dtype), x1, down), ASM)
        x_rows += 128
        scales += 16
        words += 192
        values += 128
    place = (split.to(tl.int64) * num_pairs + pairs)[None, :] * max_rank + slot[:, None]
    tl.store(down_ptr + place, down.to(down_ptr.dtype.element_ty), mask=valid[None, :] & (slot < max_rank)[:, None])


@triton.jit(
    do_not_specialize=["num_pairs", "top_k", "max_blocks", "unit_chunk", "splits", "rank_tiles"],
)
def _project_kernel(
    x_ptr, v_ptr, v_scale_ptr, rank_blocks_ptr, down_ptr,
    pairs_ptr, experts_ptr, num_blocks_ptr, ids_ptr, map_ptr,
    K, num_pairs, top_k, max_rank, max_blocks, unit_chunk, splits, rank_tiles,
    PARTS: tl.constexpr, FACTOR_BITS: tl.constexpr, RANKS: tl.constexpr,
    BF16: tl.constexpr, ASM: tl.constexpr, EVEN_K: tl.constexpr, HAS_MAP: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr, SUB_BLOCKS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """V·x of BLOCK_M pairs, RANKS ranks and ``unit_chunk`` units of K; SUB_BLOCKS of them are a block of the GEMM."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    block = program // (splits * rank_tiles)
    split = program % splits
    tile = program // splits % rank_tiles
    expert = block_expert(
        experts_ptr, num_blocks_ptr, ids_ptr, map_ptr, block // SUB_BLOCKS, max_blocks, HAS_MAP, BLOCKS
    )  # fmt: skip
    pairs = load_pairs(pairs_ptr, block, num_pairs, max_blocks * SUB_BLOCKS, BLOCK_M, BLOCKS)
    if expert >= 0:
        rows = tl.where(pairs < num_pairs, pairs // top_k, 0)
        _down_project(
            x_ptr, v_ptr, v_scale_ptr, rank_blocks_ptr, down_ptr, expert, pairs, rows, tile * RANKS, split,
            unit_chunk, K, num_pairs, max_rank, PARTS, FACTOR_BITS, RANKS, BF16, ASM, EVEN_K, BLOCK_M, STAGES,
        )  # fmt: skip


def block_kind(blocks: TokenBlocks, routes: Routes | None) -> str:
    """Return which blocks the kernels read, in the words of :func:`load_pairs`."""
    if routes is None:
        return "rows"
    return "single" if blocks.pairs is None else "sorted"


def _splits(dense: bool, tile_m: int, split_k: int, programs: int, units: int, early: bool) -> int:
    """Return the parts of K, were there ``programs`` programs for each.

    Beside the GEMM's loop programs have time, but each takes the place of one of its tiles (of ``tile_m`` pairs, one
    of ``split_k`` parts of K). With few tokens a program of V·x has a quarter of a tile's units, and at most eight, and
    is done in time. Dense layers have so many ranks that their GEMM waits for V·x anyway, and adds few parts.
    """
    filling = triton.cdiv(256 if early else 1024, programs)
    if dense:
        splits = min(8 if programs <= 16 else 4, filling) if tile_m <= 64 else 1
    elif tile_m <= 32:
        splits = triton.next_power_of_2(max(4 * split_k, triton.cdiv(units, 8)))
    else:
        splits = 16 if filling >= 12 else 4 if filling >= 3 else 1
    splits = max(1, min(16, splits, 2 * units // 3))
    return 1 << (splits.bit_length() - 1)  # few different numbers: the GEMM is compiled for each


def project(
    x: torch.Tensor,
    weights: KernelWeights,
    blocks: TokenBlocks,
    routes: Routes | None,
    top_k: int,
    factor_bits: int,
    max_rank: int,
    split_k: int,
    mode: LaunchMode,
) -> torch.Tensor | None:
    """Return V·x as in :class:`Projected`.

    Args:
        x: activations, fp16 or bf16 [rows, K], contiguous; pair p reads row p // top_k.
        weights: the GEMM's weights.
        blocks: the pairs in the GEMM's blocks.
        routes: where the pairs go; None for a dense layer, whose pairs are its rows.
        top_k: pairs that share a row of x.
        factor_bits: 3, 8 or 16.
        max_rank: largest rank of an expert, each part padded to 16; 0 for none.
        split_k: parts of K of the GEMM.
        mode: how to launch.
    """
    if max_rank == 0:
        return None
    rows, k = x.shape
    units = triton.cdiv(k, UNIT)
    num_pairs = rows if routes is None else routes.num_pairs
    num_experts = weights.packed.shape[0]
    block_m = min(64, blocks.block_m)
    sub_blocks = blocks.block_m // block_m
    count = blocks.max_blocks * sub_blocks
    rank_tiles = triton.cdiv(max_rank, RANKS)
    splits = _splits(routes is None, blocks.block_m, split_k, count * rank_tiles, units, mode.early)
    down_dtype = x.dtype if splits == 1 else torch.float32
    down = torch.empty(splits, num_pairs, max_rank, dtype=down_dtype, device=x.device)
    launch(
        _project_kernel,
        (count * splits * rank_tiles,),
        mode,
        x,
        weights.v,
        weights.v_scale,
        weights.rank_blocks,
        down,
        blocks.pairs,
        blocks.experts,
        blocks.num_blocks,
        None if routes is None else routes.ids,
        None if routes is None else routes.expert_map,
        k,
        num_pairs,
        top_k,
        max_rank,
        blocks.max_blocks,
        triton.cdiv(units, splits),
        splits,
        rank_tiles,
        PARTS=(weights.rank_blocks.shape[0] - 1) // num_experts,
        FACTOR_BITS=factor_bits,
        RANKS=RANKS,
        BF16=x.dtype == torch.bfloat16,
        ASM=mode.asm,
        EVEN_K=k % 128 == 0,
        HAS_MAP=routes is not None and routes.expert_map is not None,
        BLOCKS=block_kind(blocks, routes),
        BLOCK_M=block_m,
        SUB_BLOCKS=sub_blocks,
        STAGES=4 if block_m <= 32 else 2,
        PDL=mode.early,
        num_warps=4,
    )
    return down
