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
from ..blocks import load_pairs, rows_of
from .products import multiply
from .up_factor import Columns, part_ranks
from .up_projection import add_gated_up_projection, add_up_projection


@triton.jit
def _load_both(first_ptr, second_ptr, rows, BLOCK_M: tl.constexpr):
    """Values of the tile's rows in two arrays, fp32 [BLOCK_M] each.

    They are loaded as one tensor with a value for each of 128 threads or more. A smaller one Triton has loaded anew by
    every thread for the rows whose sums it holds, a quarter of BLOCK_M.
    """
    times: tl.constexpr = 64 // BLOCK_M if BLOCK_M < 64 else 1
    is_first = (tl.arange(0, 2 * times) % 2 == 0)[None, :]
    values = tl.load(tl.where(is_first, first_ptr + rows[:, None], second_ptr + rows[:, None]))
    first, second = tl.split(tl.reshape(values, (BLOCK_M, times, 2)))
    return tl.max(first, 1), tl.max(second, 1)


@triton.jit
def tile_part(tile, shape, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """(part, first column of the part, first column of the tile in its part, width of the part) of a tile."""
    part = tile * 0
    start = part
    first_tile = part
    width = shape.n0
    if PARTS > 1:
        end0 = tl.cdiv(shape.n0, BLOCK_N)
        part = (tile >= end0).to(tl.int32)
        start = tl.where(part == 0, 0, shape.n0)
        first_tile = tl.where(part == 0, 0, end0)
        width = tl.where(part == 0, shape.n0, shape.n1)
    if PARTS > 2:
        end1 = end0 + tl.cdiv(shape.n1, BLOCK_N)
        end2 = end1 + tl.cdiv(shape.n2, BLOCK_N)
        in_third, in_fourth = tile >= end1, tile >= end2
        part += in_third.to(tl.int32) + in_fourth.to(tl.int32)
        start += tl.where(in_third, shape.n1, 0) + tl.where(in_fourth, shape.n2, 0)
        first_tile = tl.where(in_fourth, end2, tl.where(in_third, end1, first_tile))
        width = tl.where(in_fourth, shape.n3, tl.where(in_third, shape.n2, width))
    return part, start, (tile - first_tile) * BLOCK_N, width


@triton.jit
def compute_tile(
    activations, weights, compensators, scales, output, blocks, shape, counts, max_blocks,
    expert, block, pairs, few_block, few, tile, split_index,
    TILE: tl.constexpr, BLOCK_M: tl.constexpr, FEW_M: tl.constexpr,
):  # fmt: skip
    """One tile of :func:`.kernel.gemm_kernel`, for BLOCK_M pairs, and with FEW_M for so many further ones."""
    rows, valid = rows_of(pairs, counts.num_pairs, counts.top_k, TILE.SHARED_ROWS)
    few_rows, few_valid = rows_of(few, counts.num_pairs, counts.top_k, TILE.SHARED_ROWS)
    part, start, first_column, width = tile_part(tile, shape, TILE.BLOCK_N, TILE.PARTS)
    column = first_column + tl.arange(0, TILE.BLOCK_N)
    inside = column < width
    if TILE.EVEN_N:
        inside = column >= 0
    n = start + column
    ranks = part
    if TILE.HAS_RANK:  # read before the loop, for the epilogue's sake
        ranks = part_ranks(compensators, expert, part, TILE.PARTS)
    acc, few_acc = multiply(
        activations, weights, shape, counts.num_rows, expert, rows, valid, few_rows, few_valid, n, inside, split_index,
        TILE, BLOCK_M, FEW_M,
    )  # fmt: skip
    if TILE.PDL and TILE.HAS_RANK:
        tl.extra.cuda.gdc_wait()
    if TILE.PDL:
        tl.extra.cuda.gdc_launch_dependents()
    columns = Columns(first_column, column, inside, width)
    x_dtype: tl.constexpr = activations.x.dtype.element_ty
    if FEW_M > 0:  # first, since their sums take fewer registers meanwhile
        _store_tile(
            few_acc, compensators, scales, output, blocks, shape, counts, max_blocks * (BLOCK_M // FEW_M), few_block,
            ranks, columns, n, split_index, x_dtype, TILE, FEW_M,
        )  # fmt: skip
    _store_tile(
        acc, compensators, scales, output, blocks, shape, counts, max_blocks, block, ranks, columns, n, split_index,
        x_dtype, TILE, BLOCK_M,
    )  # fmt: skip


@triton.jit
def _store_tile(
    acc, compensators, scales, output, blocks, shape, counts, max_blocks, block, ranks, columns, n, split_index,
    x_dtype: tl.constexpr, TILE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Add the up-projection to a block's sums and store them."""
    kind: tl.constexpr = TILE.BLOCKS
    # once more: registers are short in the loop
    pairs = load_pairs(blocks, block, counts.num_pairs, max_blocks, BLOCK_M, kind)
    rows, valid = rows_of(pairs, counts.num_pairs, counts.top_k, TILE.SHARED_ROWS)
    row_scale = rows
    if TILE.HAS_ROW_SCALE:  # asked for with V·x, which takes as long to come
        row_scale, _ = _load_both(scales.row_scale, scales.row_scale, rows, BLOCK_M)
    if TILE.HAS_RANK:
        acc = add_up_projection(
            acc, compensators, ranks, columns, counts, pairs, valid, split_index, x_dtype, TILE, BLOCK_M
        )  # fmt: skip
    if TILE.HAS_ROW_SCALE:
        acc *= row_scale[None, :]
    part_ptr = output.y + split_index.to(tl.int64) * counts.num_pairs * shape.N
    target = part_ptr + pairs[None, :].to(tl.int64) * shape.N + n[:, None]
    # not ``valid``: as a mask over the tile it takes up to 32 instructions more (tiles of 128)
    inside = (pairs[None, :] < counts.num_pairs) & columns.inside[:, None]
    tl.store(target, acc.to(output.y.dtype.element_ty), mask=inside)


@triton.jit
def compute_gated_tile(
    activations, weights, compensators, scales, output, blocks, shape, counts, max_blocks,
    expert, block, pairs, few_block, few, tile, split_index,
    TILE: tl.constexpr, BLOCK_M: tl.constexpr, FEW_M: tl.constexpr,
):  # fmt: skip
    """One tile of gate and up together, as :func:`compute_tile`: h = act(gate)·up of BLOCK_N / 2 outputs.

    Eight rows of the tile are gate's, the next eight up's, and so on, so that a thread holds both halves of its
    outputs. A row of h is divided by a power of two that keeps it in fp16 whatever the weights' signs: norms bound it.
    """
    rows, valid = rows_of(pairs, counts.num_pairs, counts.top_k, TILE.SHARED_ROWS)
    few_rows, few_valid = rows_of(few, counts.num_pairs, counts.top_k, TILE.SHARED_ROWS)
    lane = tl.arange(0, TILE.BLOCK_N)
    first_column = tile * (TILE.BLOCK_N // 2)
    column = first_column + lane // 16 * 8 + lane % 8
    is_up = lane // 8 % 2 == 1
    width = shape.N // 2
    n = column + tl.where(is_up, width, 0)
    inside = column >= 0
    acc, few_acc = multiply(
        activations, weights, shape, counts.num_rows, expert, rows, valid, few_rows, few_valid, n, inside, split_index,
        TILE, BLOCK_M, FEW_M,
    )  # fmt: skip
    if TILE.PDL and TILE.HAS_RANK:
        tl.extra.cuda.gdc_wait()
    if TILE.PDL:
        tl.extra.cuda.gdc_launch_dependents()
    columns = Columns(first_column, column, inside, width)
    if FEW_M > 0:  # first, as above
        _store_gated_tile(
            few_acc, compensators, scales, output, blocks, counts, max_blocks * (BLOCK_M // FEW_M), expert, few_block,
            columns, is_up, tile, TILE, FEW_M,
        )  # fmt: skip
    _store_gated_tile(
        acc, compensators, scales, output, blocks, counts, max_blocks, expert, block, columns, is_up, tile,
        TILE, BLOCK_M,
    )  # fmt: skip


@triton.jit
def _store_gated_tile(
    acc, compensators, scales, output, blocks, counts, max_blocks, expert, block, columns, is_up, tile,
    TILE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Add the up-projection to a block's sums, apply the activation function and store h."""
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    activation: tl.constexpr = TILE.ACTIVATION
    kind: tl.constexpr = TILE.BLOCKS
    # once more: registers are short in the loop
    pairs = load_pairs(blocks, block, counts.num_pairs, max_blocks, BLOCK_M, kind)
    rows, valid = rows_of(pairs, counts.num_pairs, counts.top_k, TILE.SHARED_ROWS)
    # asked for with V·x, which takes as long to come
    row_scale, norm = _load_both(scales.row_scale, scales.norms, rows, BLOCK_M)
    largest = tl.load(scales.largest + expert * 2) * norm * (tl.load(scales.largest + expert * 2 + 1) * norm)
    if TILE.HAS_RANK:
        acc = add_gated_up_projection(
            acc, compensators, columns, is_up, counts, expert, pairs, valid, TILE, BLOCK_M
        )  # fmt: skip
    scale, inverse = power_of_two(largest * 0.00006103515625)  # 2^-14: h / scale stays below 2^15
    gate, up = tl.split(tl.permute(tl.reshape(acc, (BLOCK_N // 16, 2, 8, BLOCK_M)), (0, 2, 3, 1)))
    gate *= row_scale[None, None, :]
    up *= (row_scale * inverse)[None, None, :]
    h = gated(gate, up, activation, TILE.ASM).to(tl.float16)
    place = columns.first + tl.arange(0, BLOCK_N // 16)[:, None] * 8 + tl.arange(0, 8)[None, :]
    target = output.y + pairs[None, None, :].to(tl.int64) * columns.width + place[:, :, None]
    # not ``valid``, as above
    tl.store(target, h, mask=(pairs[None, None, :] < counts.num_pairs) & (place >= 0)[:, :, None])
    if tile == 0:
        tl.store(output.scale + pairs, scale, mask=valid)
