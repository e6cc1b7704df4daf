"""The loop over K of a tile: W·x, with the weights dequantized in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from .dequant import (
    WARPGROUP_TOKENS,
    add_group,
    code_operand,
    fast_operand,
    finished,
    operand_order,
    quarter_operand,
    scale_and_zero,
    scaled,
    unit_of_scales,
)
from .lanes import load_lanes


@triton.jit
def _add_quarters(acc, w0, w1, w2, scale_zero, sums, x_rows, valid, unit, K, TILE: tl.constexpr, BLOCK_M: tl.constexpr):
    """acc += the products of a unit in groups of 32, each scaled by itself."""
    BF16: tl.constexpr = TILE.BF16
    ASM: tl.constexpr = TILE.ASM
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    even, odd = tl.split(tl.reshape(scale_zero, (BLOCK_N, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    sum_even, sum_odd = tl.split(tl.reshape(tl.load(sums), (BLOCK_M, 2, 2)))
    sum0, sum2 = tl.split(sum_even)
    sum1, sum3 = tl.split(sum_odd)
    k32 = tl.arange(0, 32)
    low_mask = valid[None, :] & (k32 >= 0)[:, None]
    high_mask = low_mask & (unit * 128 + 64 < K)
    y0 = tl.load(x_rows + k32[:, None], mask=low_mask, other=0.0)
    y1 = tl.load(x_rows + (32 + k32)[:, None], mask=low_mask, other=0.0)
    y2 = tl.load(x_rows + (64 + k32)[:, None], mask=high_mask, other=0.0)
    y3 = tl.load(x_rows + (96 + k32)[:, None], mask=high_mask, other=0.0)
    scale, zero = scale_and_zero(first)
    product = tl.dot(quarter_operand(w0, w1, w2, 0, BF16, ASM, BLOCK_N), y0)
    acc = add_group(acc, product, sum0, scale, zero, 0, BF16)
    scale, zero = scale_and_zero(second)
    product = tl.dot(quarter_operand(w0, w1, w2, 1, BF16, ASM, BLOCK_N), y1)
    acc = add_group(acc, product, sum1, scale, zero, 0, BF16)
    scale, zero = scale_and_zero(third)
    product = tl.dot(quarter_operand(w0, w1, w2, 2, BF16, ASM, BLOCK_N), y2)
    acc = add_group(acc, product, sum2, scale, zero, 1, BF16)
    scale, zero = scale_and_zero(fourth)
    product = tl.dot(quarter_operand(w0, w1, w2, 3, BF16, ASM, BLOCK_N), y3)
    return add_group(acc, product, sum3, scale, zero, 1, BF16)


@triton.jit
def load_halves(x_rows, x_mask, unit, K, WARP: tl.constexpr, EVEN_K: tl.constexpr):
    """Both halves of a unit of x [64, BLOCK_M], from rows [1, BLOCK_M].

    Without the mask all rows that no pair has were read from one place of the L2 cache, and a layer half of whose rows
    are such took 1.7 times as long (an H200, ``tiles-that-lose-h200.json``).
    """
    k64 = operand_order(64, WARP)
    first = tl.load(x_rows + k64[:, None], mask=x_mask, other=0.0)
    if EVEN_K:
        second = tl.load(x_rows + (64 + k64)[:, None], mask=x_mask, other=0.0)
    else:
        second = tl.load(x_rows + (64 + k64)[:, None], mask=x_mask & (unit * 128 + 64 < K), other=0.0)
    return first, second


@triton.jit
def _add_product(acc, few_acc, operand, x, few_x, ASM: tl.constexpr, FEW_M: tl.constexpr):
    """Both sums with the products of an operand, the second one's where there are FEW_M pairs of it, waited for."""
    acc = tl.dot(operand, x, acc)
    if FEW_M > 0:
        few_acc = finished(tl.dot(operand, few_x, few_acc), ASM)
    return finished(acc, ASM), few_acc


@triton.jit
def _add_halves(
    acc, few_acc, w0, w1, w2, scale_zero, sums, x0, x1, few_x0, few_x1,
    TILE: tl.constexpr, WARP: tl.constexpr, FEW_M: tl.constexpr,
):  # fmt: skip
    """Both sums with the products of a unit in two halves, of one group of 128 or of two of 64."""
    BF16: tl.constexpr = TILE.BF16
    ASM: tl.constexpr = TILE.ASM
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    wide: tl.constexpr = TILE.SCALE == "weights" and TILE.BF16
    if TILE.GROUP == 64:
        word0, word1 = tl.split(scale_zero)
    else:
        word0 = tl.reshape(scale_zero, (BLOCK_N,))
        word1 = word0
    if TILE.SCALE == "fast":
        first_half = fast_operand(w0, w1, w2, word0, 0, ASM, WARP, BLOCK_N)
        acc, few_acc = _add_product(acc, few_acc, first_half, x0, few_x0, ASM, FEW_M)
        second_half = fast_operand(w0, w1, w2, word1, 1, ASM, WARP, BLOCK_N)
        acc, few_acc = _add_product(acc, few_acc, second_half, x1, few_x1, ASM, FEW_M)
    else:
        scale0, zero0 = scale_and_zero(word0)
        scale1, zero1 = scale_and_zero(word1)
        codes0 = code_operand(w0, w1, w2, 0, BF16, wide, ASM, WARP, BLOCK_N)
        codes1 = code_operand(w0, w1, w2, 1, BF16, wide, ASM, WARP, BLOCK_N)
        if TILE.SCALE == "weights":
            unit: tl.constexpr = 1.0 if BF16 else 0.0000152587890625  # fp16 holds no weight of a scale of up to 2^16
            first_half = scaled(codes0, scale0, zero0, 0, BF16, unit)
            second_half = scaled(codes1, scale1, zero1, 1, BF16, unit)
            acc = tl.dot(first_half, x0, acc)
            if FEW_M > 0:
                few_acc = tl.dot(first_half, few_x0, few_acc)
            acc, few_acc = _add_product(acc, few_acc, second_half, x1, few_x1, ASM, FEW_M)
        else:
            sum0, sum1 = tl.split(tl.load(sums))
            acc = add_group(acc, tl.dot(codes0, x0), sum0, scale0, zero0, 0, BF16)
            acc = add_group(acc, tl.dot(codes1, x1), sum1, scale1, zero1, 1, BF16)
    return acc, few_acc


@triton.jit
def multiply(
    activations, weights, shape, num_rows, expert, rows, valid, few_rows, few_valid, n, inside, split_index,
    TILE: tl.constexpr, BLOCK_M: tl.constexpr, FEW_M: tl.constexpr,
):  # fmt: skip
    """W·x of an expert's outputs ``n`` and of ``rows`` of x over one of SPLIT_K parts of K, fp32 [BLOCK_N, BLOCK_M].

    And of ``few_rows``, where there are FEW_M of them, by the same dequantized weights, [BLOCK_N, FEW_M].
    """
    N = shape.N
    K = shape.K
    units = (K + 127) // 128
    chunk = tl.cdiv(units, TILE.SPLIT_K)
    begin = split_index * chunk
    end = tl.minimum(begin + chunk, units)
    lane = tl.arange(0, 4)
    k64 = tl.arange(0, 64)
    first_unit = expert.to(tl.int64) * units + begin
    words = weights.packed + first_unit * (12 * N) + (n // 64 * 768 + n % 64 * 4)[:, None] + lane[None, :]
    word_mask = inside[:, None] & (lane >= 0)[None, :]
    groups: tl.constexpr = 128 // TILE.GROUP
    group = tl.arange(0, groups)
    scales = weights.scale_zero + first_unit * (N * groups) + (n * groups)[:, None] + group[None, :]
    scale_mask = inside[:, None] & (group >= 0)[None, :]
    WARP: tl.constexpr = TILE.WARP_MMA or BLOCK_M < WARPGROUP_TOKENS
    if TILE.LANES:
        x_rows = activations.lanes + (rows.to(tl.int64) * units + begin) * 64
    else:
        x_rows = activations.x + rows[None, :].to(tl.int64) * K + begin * 128
    sums_per_unit: tl.constexpr = 4 if TILE.GROUP == 32 else 2
    sum_lane = tl.arange(0, sums_per_unit)
    sums = activations.sums + ((begin.to(tl.int64) * num_rows + rows) * sums_per_unit)[:, None] + sum_lane[None, :]
    x_mask = valid[None, :] & (k64 >= 0)[:, None]
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    few_acc = acc
    if FEW_M > 0:
        few_acc = tl.zeros((BLOCK_N, FEW_M), tl.float32)
        few_x_rows = activations.x + few_rows[None, :].to(tl.int64) * K + begin * 128
        few_mask = few_valid[None, :] & (k64 >= 0)[:, None]
    for unit in tl.range(begin, end, num_stages=TILE.STAGES):
        if TILE.EVEN_N:
            w0 = tl.load(words)
            w1 = tl.load(words + 256)
            w2 = tl.load(words + 512)
            scale_zero = tl.load(scales)
        else:
            w0 = tl.load(words, mask=word_mask, other=0)
            w1 = tl.load(words + 256, mask=word_mask, other=0)
            w2 = tl.load(words + 512, mask=word_mask, other=0)
            scale_zero = tl.load(scales, mask=scale_mask, other=0)
        if TILE.GROUP == 32:
            acc = _add_quarters(acc, w0, w1, w2, scale_zero, sums, x_rows, valid, unit, K, TILE, BLOCK_M)
        else:
            if TILE.LANES:
                x0, x1 = load_lanes(x_rows, valid, activations.x.dtype.element_ty, BLOCK_M)
            else:
                x0, x1 = load_halves(x_rows, x_mask, unit, K, WARP, TILE.EVEN_K)
            few_x0, few_x1 = x0, x1
            if FEW_M > 0:
                few_x0, few_x1 = load_halves(few_x_rows, few_mask, unit, K, WARP, TILE.EVEN_K)
                few_x_rows += 128
            acc, few_acc = _add_halves(
                acc, few_acc, w0, w1, w2, scale_zero, sums, x0, x1, few_x0, few_x1, TILE, WARP, FEW_M
            )  # fmt: skip
        words += 12 * N
        scales += N * groups
        x_rows += 64 if TILE.LANES else 128
        sums += num_rows * sums_per_unit
    shift: tl.constexpr = 24 if TILE.SCALE == "fast" else (16 if TILE.SCALE == "weights" and not TILE.BF16 else 0)
    one = unit_of_scales(tl.load(weights.exponents + expert), shift)
    return acc * one, few_acc * one
