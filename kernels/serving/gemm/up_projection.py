"""The compensators' up-projection, which a tile adds to its sums: Uᵀ·(V·x)."""

from __future__ import annotations

import triton
import triton.language as tl

from .dequant import finished


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
def add_up_projection(
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
def add_gated_up_projection(
    acc, u_ptr, u_scale_ptr, rank_blocks_ptr, u_starts_ptr, down_ptr, expert, first_column, column, is_up, width,
    pairs, valid, num_pairs, max_rank, DOWN_SPLITS: tl.constexpr, ASM: tl.constexpr, FACTOR_BITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, RANK_STEP: tl.constexpr,
):  # fmt: skip
    """acc += Uᵀ·(V·x) where gate's columns and up's alternate: what both need is loaded before it is used."""
    groups: tl.constexpr = BLOCK_N // 128 if BLOCK_N >= 128 else 1
    stages: tl.constexpr = 2 if RANK_STEP > 16 and DOWN_SPLITS == 1 else 1  # more splits have no room for two
    gate_blocks, gate_before, gate_start = part_ranks(rank_blocks_ptr, u_starts_ptr, expert, 0, 2)
    up_blocks, up_before, up_start = part_ranks(rank_blocks_ptr, u_starts_ptr, expert, 1, 2)
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
def part_ranks(rank_blocks_ptr, u_starts_ptr, expert, part, PARTS: tl.constexpr):
    """(blocks of 16 ranks of a part of an expert, ranks of the parts before it, where its part of U starts)."""
    slot = expert * PARTS + part
    first = tl.load(rank_blocks_ptr + slot)
    blocks = tl.load(rank_blocks_ptr + slot + 1) - first
    return blocks, (first - tl.load(rank_blocks_ptr + expert * PARTS)) * 16, tl.load(u_starts_ptr + slot)
