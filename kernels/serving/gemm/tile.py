"""Device code of one GEMM tile: the loop over K, then the compensators' up-projection, then the store.

With many tokens the first GEMM of a MoE layer applies the activation before the store (:func:`compute_gated_tile`).

Operands are swapped: weights are the MMA's A operand (rows of outputs), tokens its B operand, since at decode
an expert has few tokens, and because dequantized weights then go from registers into the MMA. See
:mod:`.dequant` for the arithmetic and :mod:`..layout` for the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..activation import gated, power_of_two
from ..blocks import load_pairs
from .products import multiply
from .up_projection import add_gated_up_projection, add_up_projection, part_ranks


@triton.jit
def _tile_part(tile, n0, n1, n2, n3, BLOCK_N: tl.constexpr):
    """(part, first column of the part, first column of the tile in its part, width of the part) of a tile."""
    end0 = tl.cdiv(n0, BLOCK_N)
    end1 = end0 + tl.cdiv(n1, BLOCK_N)
    end2 = end1 + tl.cdiv(n2, BLOCK_N)
    part = (tile >= end0).to(tl.int32) + (tile >= end1).to(tl.int32) + (tile >= end2).to(tl.int32)
    first_tile = tl.where(part == 0, 0, tl.where(part == 1, end0, tl.where(part == 2, end1, end2)))
    start = tl.where(part == 0, 0, tl.where(part == 1, n0, tl.where(part == 2, n0 + n1, n0 + n1 + n2)))
    width = tl.where(part == 0, n0, tl.where(part == 1, n1, tl.where(part == 2, n2, n3)))
    return part, start, (tile - first_tile) * BLOCK_N, width


@triton.jit
def compute_tile(
    x_ptr, sums_ptr, packed_ptr, scale_zero_ptr, u_ptr, u_scale_ptr, rank_blocks_ptr, u_starts_ptr, down_ptr,
    row_scale_ptr, out_ptr, pairs_ptr, expert, block, pairs, tile, split_index,
    N, K, n0, n1, n2, n3, num_pairs, num_rows, top_k, max_rank, max_blocks,
    PARTS: tl.constexpr, GROUP: tl.constexpr, FACTOR_BITS: tl.constexpr, HAS_RANK: tl.constexpr,
    DOWN_SPLITS: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr,
    SCALE: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, HAS_ROW_SCALE: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr, STAGES: tl.constexpr,
    RANK_STEP: tl.constexpr, LATE_WAIT: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One tile of :func:`.kernel.gemm_kernel`, for BLOCK_M pairs."""
    valid = pairs < num_pairs
    rows = tl.where(valid, pairs // top_k, 0)
    part, start, tile_column, width = _tile_part(tile, n0, n1, n2, n3, BLOCK_N)
    column = tile_column + tl.arange(0, BLOCK_N)
    inside = column < width
    if EVEN_N:
        inside = column >= 0
    n = start + column
    if HAS_RANK:  # read before the loop, for the epilogue's sake
        blocks, ranks_before, u_start = part_ranks(rank_blocks_ptr, u_starts_ptr, expert, part, PARTS)
    acc = multiply(
        x_ptr, sums_ptr, packed_ptr, scale_zero_ptr, expert, rows, valid, n, inside, split_index, N, K, num_rows,
        GROUP, BF16, ASM, SCALE, EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, SPLIT_K, STAGES,
    )  # fmt: skip
    if LATE_WAIT:
        tl.extra.cuda.gdc_wait()
    if PDL:  # not sooner: what is launched next would take the place of this launch's own tiles
        tl.extra.cuda.gdc_launch_dependents()
    # once more: registers are short in the loop
    pairs = load_pairs(pairs_ptr, block, num_pairs, max_blocks, BLOCK_M, BLOCKS)
    valid = pairs < num_pairs
    rows = tl.where(valid, pairs // top_k, 0)
    if HAS_RANK:
        acc = add_up_projection(
            acc, u_ptr, u_scale_ptr, down_ptr, blocks, ranks_before, u_start, tile_column, column, inside,
            width, pairs, valid, num_pairs, max_rank, split_index, DOWN_SPLITS, x_ptr.dtype.element_ty,
            ASM, FACTOR_BITS, BLOCK_N, BLOCK_M, SPLIT_K, RANK_STEP,
        )  # fmt: skip
    if HAS_ROW_SCALE:
        acc *= tl.load(row_scale_ptr + rows)[None, :]
    target = (split_index.to(tl.int64) * num_pairs + pairs)[None, :] * N + n[:, None]
    tl.store(out_ptr + target, acc.to(out_ptr.dtype.element_ty), mask=valid[None, :] & inside[:, None])


@triton.jit
def compute_gated_tile(
    x_ptr, packed_ptr, scale_zero_ptr, u_ptr, u_scale_ptr, rank_blocks_ptr, u_starts_ptr, down_ptr,
    row_scale_ptr, norm_ptr, largest_ptr, out_ptr, out_scale_ptr, pairs_ptr, expert, block, pairs, tile, split_index,
    N, K, num_pairs, top_k, max_rank, max_blocks,
    GROUP: tl.constexpr, FACTOR_BITS: tl.constexpr, HAS_RANK: tl.constexpr,
    DOWN_SPLITS: tl.constexpr, ASM: tl.constexpr, EVEN_K: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, RANK_STEP: tl.constexpr,
    LATE_WAIT: tl.constexpr, ACTIVATION: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One tile of gate and up together: h = act(gate)·up of BLOCK_N / 2 outputs and BLOCK_M pairs, in fp16.

    Eight rows of the tile are gate's, the next eight up's, and so on, so that a thread holds both halves of its
    outputs. A row of h is divided by a power of two that keeps it in fp16 whatever the weights' signs: norms bound it.
    """
    valid = pairs < num_pairs
    rows = tl.where(valid, pairs // top_k, 0)
    lane = tl.arange(0, BLOCK_N)
    first_column = tile * (BLOCK_N // 2)
    column = first_column + lane // 16 * 8 + lane % 8
    is_up = lane // 8 % 2 == 1
    width = N // 2
    acc = multiply(
        x_ptr, x_ptr, packed_ptr, scale_zero_ptr, expert, rows, valid, column + tl.where(is_up, width, 0),
        column >= 0, split_index, N, K, num_pairs,
        GROUP, False, ASM, "fast", True, EVEN_K, BLOCK_M, BLOCK_N, 1, STAGES,
    )  # fmt: skip
    if LATE_WAIT:
        tl.extra.cuda.gdc_wait()
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    # once more: registers are short in the loop
    pairs = load_pairs(pairs_ptr, block, num_pairs, max_blocks, BLOCK_M, BLOCKS)
    valid = pairs < num_pairs
    rows = tl.where(valid, pairs // top_k, 0)
    if HAS_RANK:
        acc = add_gated_up_projection(
            acc, u_ptr, u_scale_ptr, rank_blocks_ptr, u_starts_ptr, down_ptr, expert, first_column, column, is_up,
            width, pairs, valid, num_pairs, max_rank, DOWN_SPLITS, ASM, FACTOR_BITS, BLOCK_N, BLOCK_M, RANK_STEP,
        )  # fmt: skip
    acc *= tl.load(row_scale_ptr + rows)[None, :]
    gate, up = tl.split(tl.permute(tl.reshape(acc, (BLOCK_N // 16, 2, 8, BLOCK_M)), (0, 2, 3, 1)))
    norm = tl.load(norm_ptr + rows)
    largest = tl.load(largest_ptr + expert * 2) * norm * (tl.load(largest_ptr + expert * 2 + 1) * norm)
    scale, inverse = power_of_two(largest * 0.00006103515625)  # 2^-14: h / scale stays below 2^15
    h = (gated(gate, up, ACTIVATION) * inverse[None, None, :]).to(tl.float16)
    place = first_column + tl.arange(0, BLOCK_N // 16)[:, None] * 8 + tl.arange(0, 8)[None, :]
    target = out_ptr + pairs[None, None, :].to(tl.int64) * width + place[:, :, None]
    tl.store(target, h, mask=valid[None, None, :] & (place >= 0)[:, :, None])
    if tile == 0:
        tl.store(out_scale_ptr + pairs, scale, mask=valid)
