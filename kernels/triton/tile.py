"""Device code of one GEMM tile: the loop over K, then the compensators' up-projection, then the store.

With many tokens the first GEMM of a MoE layer applies the activation before the store (:func:`compute_gated_tile`).

Operands are swapped: weights are the MMA's A operand (rows of outputs), tokens its B operand, since at decode
an expert has few tokens, and because dequantized weights then go from registers into the MMA. See
:mod:`.dequant` for the arithmetic and :mod:`.layout` for the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import gated, power_of_two
from .dequant import add_group, code_operand, fast_operand, finished, quarter_operand, scale_and_zero, scaled
from .project import load_pairs


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
def _up_codes(
    u_ptr, u_start, rank_block, blocks, column, inside, width,
    FACTOR_BITS: tl.constexpr, BLOCK_N: tl.constexpr, RANK_STEP: tl.constexpr,
):  # fmt: skip
    """Uᵀ of RANK_STEP ranks from ``rank_block`` on, not scaled yet, fp32 [BLOCK_N, RANK_STEP].

    ``u_start`` and ``blocks`` [BLOCK_N] are those of each column's part. Columns that are not ``inside``, and blocks of
    16 ranks from ``blocks`` on, give zeros.
    """
    block = rank_block + tl.arange(0, RANK_STEP // 16)
    row = u_start[:, None] // 16 * 64 + (block * width).to(tl.int64)[None, :] + column[:, None]
    mask = (inside[:, None] & (block[None, :] < blocks[:, None]))[:, :, None]
    if FACTOR_BITS == 3:
        lane = tl.arange(0, 4)
        place = u_ptr + row[:, :, None] * 4 + lane[None, None, :]
        word = tl.load(place, mask=mask & (lane >= 0)[None, None, :], other=0x4444).to(tl.int32)  # codes of 0
        low = tl.join(word & 7, (word >> 4) & 7)
        high = tl.join((word >> 8) & 7, (word >> 12) & 7)
        codes = tl.permute(tl.join(low, high), (0, 1, 4, 2, 3))  # [BLOCK_N, blocks, h, t, b]
        return (tl.reshape(codes, (BLOCK_N, RANK_STEP)) - 4).to(tl.float32)
    rank = tl.arange(0, 16)
    place = u_ptr + row[:, :, None] * 16 + rank[None, None, :]
    values = tl.load(place, mask=mask & (rank >= 0)[None, None, :], other=0)
    return tl.reshape(values, (BLOCK_N, RANK_STEP)).to(tl.float32)


@triton.jit
def _up_scales(
    u_scale_ptr, u_start, rank_block, blocks, first_column, width,
    FACTOR_BITS: tl.constexpr, RANK_STEP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Scales of RANK_STEP ranks of a part and GROUPS groups of 64 columns, fp32 [GROUPS, RANK_STEP]."""
    rank = rank_block * 16 + tl.arange(0, RANK_STEP)
    group = first_column // 64 + tl.arange(0, GROUPS)
    place = u_start + (rank // 16 * (width // 64))[None, :].to(tl.int64) * 16 + group[:, None] * 16 + (rank % 16)
    known = (rank < blocks * 16)[None, :] & (group < width // 64)[:, None]
    if FACTOR_BITS == 16:
        return tl.where(known, 1.0, 0.0)
    return tl.load(u_scale_ptr + place, mask=known, other=0.0).to(tl.float32)


@triton.jit
def _to_rows(scale, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, RANK_STEP: tl.constexpr):
    """[GROUPS, RANK_STEP] -> [BLOCK_N, RANK_STEP], each group's values for as many neighbouring rows."""
    return tl.reshape(tl.broadcast_to(scale[:, None, :], (GROUPS, BLOCK_N // GROUPS, RANK_STEP)), (BLOCK_N, RANK_STEP))


@triton.jit
def _load_down(
    down_ptr, rank_block, blocks, ranks_before, pairs, valid, num_pairs, max_rank,
    DOWN_SPLITS: tl.constexpr, dtype: tl.constexpr, BLOCK_M: tl.constexpr, RANK_STEP: tl.constexpr,
):  # fmt: skip
    """V·x of RANK_STEP ranks of a part, [RANK_STEP, BLOCK_M]."""
    lane = rank_block * 16 + tl.arange(0, RANK_STEP)
    mask = valid[None, :] & (lane < blocks * 16)[:, None]
    place = down_ptr + pairs[None, :].to(tl.int64) * max_rank + (ranks_before + lane)[:, None]
    if DOWN_SPLITS == 1:
        return tl.load(place, mask=mask, other=0.0).to(dtype)
    down = tl.zeros((RANK_STEP, BLOCK_M), tl.float32)
    for _ in tl.static_range(DOWN_SPLITS):
        down += tl.load(place, mask=mask, other=0.0)
        place += num_pairs * max_rank
    return down.to(dtype)


@triton.jit
def _add_up_projection(
    acc, u_ptr, u_scale_ptr, down_ptr, blocks, ranks_before, u_start, first_column, column, inside,
    width, pairs, valid, num_pairs, max_rank, split_index, DOWN_SPLITS: tl.constexpr, dtype: tl.constexpr,
    ASM: tl.constexpr, FACTOR_BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, SPLIT_K: tl.constexpr,
    RANK_STEP: tl.constexpr,
):  # fmt: skip
    """acc += Uᵀ·(V·x) for this tile, over this split's share of the ``blocks`` blocks of 16 ranks.

    ``ranks_before`` are those of the expert's parts before this one; its part of U starts at ``u_start``.
    """
    step: tl.constexpr = RANK_STEP // 16
    groups: tl.constexpr = BLOCK_N // 64
    stages: tl.constexpr = 2 if RANK_STEP > 16 and DOWN_SPLITS == 1 else 1  # more splits have no room for two
    share = tl.cdiv(tl.cdiv(blocks, step), SPLIT_K) * step
    begin = split_index * share
    # scales are loaded a step ahead: Triton's pipeline takes no loads as narrow as these
    scale = _up_scales(u_scale_ptr, u_start, begin, blocks, first_column, width, FACTOR_BITS, RANK_STEP, groups)
    for block in tl.range(begin, tl.minimum(begin + share, blocks), step, num_stages=stages):
        next_scale = _up_scales(
            u_scale_ptr, u_start, block + step, blocks, first_column, width, FACTOR_BITS, RANK_STEP, groups
        )  # fmt: skip
        u = _up_codes(
            u_ptr, u_start + column * 0, block, blocks + column * 0, column, inside, width,
            FACTOR_BITS, BLOCK_N, RANK_STEP,
        )  # fmt: skip
        u = (u * _to_rows(scale, groups, BLOCK_N, RANK_STEP)).to(dtype)
        scale = next_scale
        down = _load_down(
            down_ptr, block, blocks, ranks_before, pairs, valid, num_pairs, max_rank,
            DOWN_SPLITS, dtype, BLOCK_M, RANK_STEP,
        )  # fmt: skip
        acc = finished(tl.dot(u, down, acc), ASM)
    return acc


@triton.jit
def _add_gated_up_projection(
    acc, u_ptr, u_scale_ptr, rank_blocks_ptr, u_starts_ptr, down_ptr, expert, first_column, column, is_up, width,
    pairs, valid, num_pairs, max_rank, DOWN_SPLITS: tl.constexpr, ASM: tl.constexpr, FACTOR_BITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, RANK_STEP: tl.constexpr,
):  # fmt: skip
    """acc += Uᵀ·(V·x) where gate's columns and up's alternate: what both need is loaded before it is used."""
    groups: tl.constexpr = BLOCK_N // 128 if BLOCK_N >= 128 else 1
    stages: tl.constexpr = 2 if RANK_STEP > 16 and DOWN_SPLITS == 1 else 1  # more splits have no room for two
    gate_blocks, gate_before, gate_start = _part_ranks(rank_blocks_ptr, u_starts_ptr, expert, 0, 2)
    up_blocks, up_before, up_start = _part_ranks(rank_blocks_ptr, u_starts_ptr, expert, 1, 2)
    u_start = tl.where(is_up, up_start, gate_start)
    own_blocks = tl.where(is_up, up_blocks, gate_blocks)
    for block in tl.range(0, tl.maximum(gate_blocks, up_blocks), RANK_STEP // 16, num_stages=stages):
        u = _up_codes(
            u_ptr, u_start, block, own_blocks, column, column >= 0, width, FACTOR_BITS, BLOCK_N, RANK_STEP
        )  # fmt: skip
        gate_scale = _up_scales(
            u_scale_ptr, gate_start, block, gate_blocks, first_column, width, FACTOR_BITS, RANK_STEP, groups
        )  # fmt: skip
        up_scale = _up_scales(
            u_scale_ptr, up_start, block, up_blocks, first_column, width, FACTOR_BITS, RANK_STEP, groups
        )  # fmt: skip
        gate_down = _load_down(
            down_ptr, block, gate_blocks, gate_before, pairs, valid, num_pairs, max_rank,
            DOWN_SPLITS, tl.float16, BLOCK_M, RANK_STEP,
        )  # fmt: skip
        up_down = _load_down(
            down_ptr, block, up_blocks, up_before, pairs, valid, num_pairs, max_rank,
            DOWN_SPLITS, tl.float16, BLOCK_M, RANK_STEP,
        )  # fmt: skip
        gate_scale = _to_rows(gate_scale, groups, BLOCK_N, RANK_STEP)
        up_scale = _to_rows(up_scale, groups, BLOCK_N, RANK_STEP)
        acc = tl.dot((u * tl.where(is_up[:, None], 0.0, gate_scale)).to(tl.float16), gate_down, acc)
        acc = finished(tl.dot((u * tl.where(is_up[:, None], up_scale, 0.0)).to(tl.float16), up_down, acc), ASM)
    return acc


@triton.jit
def _part_ranks(rank_blocks_ptr, u_starts_ptr, expert, part, PARTS: tl.constexpr):
    """(blocks of 16 ranks of a part of an expert, ranks of the parts before it, where its part of U starts)."""
    slot = expert * PARTS + part
    first = tl.load(rank_blocks_ptr + slot)
    blocks = tl.load(rank_blocks_ptr + slot + 1) - first
    return blocks, (first - tl.load(rank_blocks_ptr + expert * PARTS)) * 16, tl.load(u_starts_ptr + slot)


@triton.jit
def _multiply(
    x_ptr, sums_ptr, packed_ptr, scale_zero_ptr, expert, rows, valid, n, inside, split_index, N, K, num_rows,
    GROUP: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr, SCALE: tl.constexpr, EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """W·x of an expert's outputs ``n`` and of ``rows`` of x over one of SPLIT_K parts of K, fp32 [BLOCK_N, BLOCK_M]."""
    units = (K + 127) // 128
    chunk = tl.cdiv(units, SPLIT_K)
    begin = split_index * chunk
    end = tl.minimum(begin + chunk, units)
    lane = tl.arange(0, 4)
    k64 = tl.arange(0, 64)
    first_unit = expert.to(tl.int64) * units + begin
    words = packed_ptr + first_unit * (12 * N) + (n // 64 * 768 + n % 64 * 4)[:, None] + lane[None, :]
    word_mask = inside[:, None] & (lane >= 0)[None, :]
    groups: tl.constexpr = 128 // GROUP
    group = tl.arange(0, groups)
    scales = scale_zero_ptr + first_unit * (N * groups) + (n * groups)[:, None] + group[None, :]
    scale_mask = inside[:, None] & (group >= 0)[None, :]
    x_rows = x_ptr + rows[None, :].to(tl.int64) * K + begin * 128
    sums_per_unit: tl.constexpr = 4 if GROUP == 32 else 2
    sum_lane = tl.arange(0, sums_per_unit)
    sums = sums_ptr + ((begin.to(tl.int64) * num_rows + rows) * sums_per_unit)[:, None] + sum_lane[None, :]
    x_mask = valid[None, :] & (k64 >= 0)[:, None]
    wide: tl.constexpr = SCALE == "weights" and BF16
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for unit in tl.range(begin, end, num_stages=STAGES):
        if EVEN_N:
            w0 = tl.load(words)
            w1 = tl.load(words + 256)
            w2 = tl.load(words + 512)
            scale_zero = tl.load(scales)
        else:
            w0 = tl.load(words, mask=word_mask, other=0)
            w1 = tl.load(words + 256, mask=word_mask, other=0)
            w2 = tl.load(words + 512, mask=word_mask, other=0)
            scale_zero = tl.load(scales, mask=scale_mask, other=0)
        if GROUP == 32:
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
            acc = add_group(acc, product, sum3, scale, zero, 1, BF16)
        else:
            x0 = tl.load(x_rows + k64[:, None], mask=x_mask, other=0.0)
            if EVEN_K:
                x1 = tl.load(x_rows + (64 + k64)[:, None], mask=x_mask, other=0.0)
            else:
                x1 = tl.load(x_rows + (64 + k64)[:, None], mask=x_mask & (unit * 128 + 64 < K), other=0.0)
            if GROUP == 64:
                word0, word1 = tl.split(scale_zero)
            else:
                word0 = tl.reshape(scale_zero, (BLOCK_N,))
                word1 = word0
            if SCALE == "fast":
                acc = finished(tl.dot(fast_operand(w0, w1, w2, word0, 0, ASM, BLOCK_N), x0, acc), ASM)
                acc = finished(tl.dot(fast_operand(w0, w1, w2, word1, 1, ASM, BLOCK_N), x1, acc), ASM)
            else:
                scale0, zero0 = scale_and_zero(word0)
                scale1, zero1 = scale_and_zero(word1)
                codes0 = code_operand(w0, w1, w2, 0, BF16, wide, ASM, BLOCK_N)
                codes1 = code_operand(w0, w1, w2, 1, BF16, wide, ASM, BLOCK_N)
                if SCALE == "weights":
                    first_half = scaled(codes0, scale0, zero0, 0, BF16)
                    second_half = scaled(codes1, scale1, zero1, 1, BF16)
                    acc = tl.dot(first_half, x0, acc)
                    acc = finished(tl.dot(second_half, x1, acc), ASM)
                else:
                    sum0, sum1 = tl.split(tl.load(sums))
                    acc = add_group(acc, tl.dot(codes0, x0), sum0, scale0, zero0, 0, BF16)
                    acc = add_group(acc, tl.dot(codes1, x1), sum1, scale1, zero1, 1, BF16)
        words += 12 * N
        scales += N * groups
        x_rows += 128
        sums += num_rows * sums_per_unit
    return acc


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
    """One tile of :func:`.gemm._gemm_kernel`, for BLOCK_M pairs."""
    valid = pairs < num_pairs
    rows = tl.where(valid, pairs // top_k, 0)
    part, start, tile_column, width = _tile_part(tile, n0, n1, n2, n3, BLOCK_N)
    column = tile_column + tl.arange(0, BLOCK_N)
    inside = column < width
    if EVEN_N:
        inside = column >= 0
    n = start + column
    if HAS_RANK:  # read before the loop, for the epilogue's sake
        blocks, ranks_before, u_start = _part_ranks(rank_blocks_ptr, u_starts_ptr, expert, part, PARTS)
    acc = _multiply(
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
        acc = _add_up_projection(
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
    acc = _multiply(
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
        acc = _add_gated_up_projection(
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
