"""The compensators' up-projection, which a tile adds to its sums: Uᵀ·(V·x)."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .dequant import WARPGROUP_TOKENS, finished, halves, operand_order, scale_and_zero

FEW_TOKENS = tl.constexpr(32)
"""Most tokens of a tile that takes :func:`_add_few`: more make V·x the larger of both operands."""


class Columns(NamedTuple):
    """The outputs of a tile.

    Attributes:
        first: the first of them, counted in their part.
        each: all of them, counted in their part, [BLOCK_N].
        inside: which of them the part has, [BLOCK_N].
        width: outputs of the part.
    """

    first: Any
    each: Any
    inside: Any
    width: Any


class PartRanks(NamedTuple):
    """The compensator of a part of an expert.

    Attributes:
        blocks: its blocks of 16 ranks.
        before: ranks of the expert's parts before this one.
        start: where its U starts, in elements of ``u_scale``.
    """

    blocks: Any
    before: Any
    start: Any


@triton.jit
def part_ranks(compensators, expert, part, PARTS: tl.constexpr):
    """Return the :class:`PartRanks` of a part of an expert."""
    slot = expert * PARTS + part
    first = tl.load(compensators.rank_blocks + slot)
    blocks = tl.load(compensators.rank_blocks + slot + 1) - first
    before = (first - tl.load(compensators.rank_blocks + expert * PARTS)) * 16
    return PartRanks(blocks, before, tl.load(compensators.u_starts + slot))


@triton.jit
def _up_rows(u_start, blocks, rank_block, columns, RANK_STEP: tl.constexpr):
    """Rows of 16 ranks of U for RANK_STEP of them from ``rank_block`` on, and which there are, [BLOCK_N, .. / 16].

    ``u_start`` and ``blocks`` [BLOCK_N] are those of each column's part: columns that are not inside have none, nor
    have blocks of 16 ranks from ``blocks`` on.
    """
    block = rank_block + tl.arange(0, RANK_STEP // 16)
    row = u_start[:, None] // 16 * 64 + (block * columns.width).to(tl.int64)[None, :] + columns.each[:, None]
    return row, columns.inside[:, None] & (block[None, :] < blocks[:, None])


@triton.jit
def _up_words(u_ptr, u_start, blocks, rank_block, columns, TILE: tl.constexpr):
    """3-bit codes of :func:`_up_rows`, four in a word, int32 [BLOCK_N, RANK_STEP / 16, t]; 0 where there are none."""
    row, there = _up_rows(u_start, blocks, rank_block, columns, TILE.RANK_STEP)
    mask = there[:, :, None]
    lane = tl.arange(0, 4)
    place = u_ptr + row[:, :, None] * 4 + lane[None, None, :]
    return tl.load(place, mask=mask & (lane >= 0)[None, None, :], other=0x4444).to(tl.int32)


@triton.jit
def _up_pairs(u_ptr, u_start, blocks, rank_block, columns, TILE: tl.constexpr):
    """The codes of :func:`_up_words` in pairs at bits 0 and 16, int32 [BLOCK_N, RANK_STEP / 16, t, h]."""
    word = _up_words(u_ptr, u_start, blocks, rank_block, columns, TILE)
    pairs = word | (word << 12)  # the first two codes at bits 0 and 16, the others 8 higher
    return tl.join(pairs, pairs >> 8)


@triton.jit
def _up_codes(u_ptr, u_start, blocks, rank_block, columns, TILE: tl.constexpr, WARP: tl.constexpr):
    """Uᵀ of RANK_STEP ranks, not scaled yet, fp32 [BLOCK_N, RANK_STEP] in `operand_order`; see :func:`_up_words`."""
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    RANK_STEP: tl.constexpr = TILE.RANK_STEP
    if TILE.FACTOR_BITS == 3:
        word = _up_words(u_ptr, u_start, blocks, rank_block, columns, TILE)
        low = tl.join(word & 7, (word >> 4) & 7)
        high = tl.join((word >> 8) & 7, (word >> 12) & 7)
        joined = tl.join(low, high)  # [BLOCK_N, blocks, t, b, h]
        codes = tl.permute(joined, (0, 1, 2, 4, 3)) if WARP else tl.permute(joined, (0, 1, 4, 2, 3))
        return (tl.reshape(codes, (BLOCK_N, RANK_STEP)) - 4).to(tl.float32)
    row, there = _up_rows(u_start, blocks, rank_block, columns, RANK_STEP)
    mask = there[:, :, None]
    rank = operand_order(16, WARP)
    place = u_ptr + row[:, :, None] * 16 + rank[None, None, :]
    values = tl.load(place, mask=mask & (rank >= 0)[None, None, :], other=0)
    return tl.reshape(values, (BLOCK_N, RANK_STEP)).to(tl.float32)


@triton.jit
def _scaled(codes, scale, GROUPS: tl.constexpr, TILE: tl.constexpr):
    """Uᵀ in fp32 from :func:`_up_codes` and scales [GROUPS, RANK_STEP]."""
    return codes * _to_rows(scale, GROUPS, TILE.BLOCK_N, TILE.RANK_STEP)


@triton.jit
def _few_codes(pairs, BF16: tl.constexpr, ASM: tl.constexpr):
    """int32 [..] -> 16 bits [.., 2]: the codes at bits 0 and 16 less 4, exactly; in fp16 times 2^-4."""
    dtype: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    if ASM:
        if BF16:  # in the mantissa of 128, less 132
            wide: tl.constexpr = (
                "{ .reg .b32 q, a, b; lop3.b32 q, $1, 0x00070007, 0x43004300, 0xEA; mov.b32 a, 0x3F803F80;"
                " mov.b32 b, 0xC304C304; fma.rn.bf16x2 $0, q, a, b; }"
            )
            bits = tl.inline_asm_elementwise(wide, "=r,r", [pairs], tl.int32, is_pure=True, pack=1)
        else:  # in the mantissa of 1024, less 1028, both times 2^-4
            half: tl.constexpr = (
                "{ .reg .b32 q, a, b; lop3.b32 q, $1, 0x00070007, 0x64006400, 0xEA; mov.b32 a, 0x2C002C00;"
                " mov.b32 b, 0xD404D404; fma.rn.f16x2 $0, q, a, b; }"
            )
            bits = tl.inline_asm_elementwise(half, "=r,r", [pairs], tl.int32, is_pure=True, pack=1)
        low, high = halves(bits, dtype)
    else:
        one: tl.constexpr = 1.0 if BF16 else 0.0625
        low = (((pairs & 7) - 4).to(tl.float32) * one).to(dtype)
        high = ((((pairs >> 16) & 7) - 4).to(tl.float32) * one).to(dtype)
    return tl.join(low, high)


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
    u_start, blocks = ranks.start + columns.each * 0, ranks.blocks + columns.each * 0
    for block in tl.range(begin, end, step, num_stages=1):  # loads of a turn are issued at once, and that is enough
        down = _load_down(
            compensators.down, ranks, block, counts, pairs, valid,
            TILE.DOWN_SPLITS, dtype, WARP, BLOCK_M, RANK_STEP,
        )  # fmt: skip
        down = finished(down.to(tl.float32), TILE.ASM)  # the parts are added before they go where the MMA wants them
        first = _few_scale(compensators.u_scale, ranks, block, columns, 0, WARP, BLOCK_M, RANK_STEP)
        second = first
        if GROUPS == 2:
            second = _few_scale(compensators.u_scale, ranks, block, columns, 1, WARP, BLOCK_M, RANK_STEP)
        pairs_of_codes = _up_pairs(compensators.u, u_start, blocks, block, columns, TILE)
        codes = _few_codes(pairs_of_codes, BF16, TILE.ASM)  # [BLOCK_N, blocks, t, h, b]
        if not WARP:
            codes = tl.permute(codes, (0, 1, 3, 2, 4))
        codes = tl.reshape(codes, (BLOCK_N, RANK_STEP))  # in the order of the operand
        product = tl.dot(codes, (down * (first * one)).to(dtype))
        if GROUPS == 2:
            other = tl.dot(codes, (down * (second * one)).to(dtype))
            product = tl.where((tl.arange(0, BLOCK_N) < 64)[:, None], product, other)
        acc += product
    return finished(acc, TILE.ASM)


@triton.jit
def _up_scales(
    u_scale_ptr, ranks, rank_block, columns,
    FACTOR_BITS: tl.constexpr, WARP: tl.constexpr, RANK_STEP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Scales of RANK_STEP ranks of a part and GROUPS groups of 64 columns, fp32 [GROUPS, RANK_STEP]."""
    groups = columns.width // 64
    group = columns.first // 64 + tl.arange(0, GROUPS)
    order = operand_order(RANK_STEP, WARP)  # known when compiled, as is what is divided here
    first = ranks.start + (rank_block * groups).to(tl.int64) * 16
    place = (order // 16)[None, :] * (groups * 16) + group[:, None] * 16 + (order % 16)[None, :]
    known = (rank_block + order // 16 < ranks.blocks)[None, :] & (group < groups)[:, None]
    if FACTOR_BITS == 16:
        return tl.where(known, 1.0, 0.0)
    return tl.load(u_scale_ptr + first + place, mask=known, other=0.0).to(tl.float32)


@triton.jit
def _scale_pairs(u_scale_ptr, ranks, rank_block, columns, RANK_STEP: tl.constexpr, GROUPS: tl.constexpr):
    """The scales of :func:`_up_scales` as fp16 of two neighbouring ranks, int32 [GROUPS, RANK_STEP / 16, t, h]."""
    block = rank_block + tl.arange(0, RANK_STEP // 16)[None, :, None, None, None]
    group = columns.first // 64 + tl.arange(0, GROUPS)[:, None, None, None, None]
    in_block = tl.arange(0, 4)[:, None, None] * 2 + tl.arange(0, 2)[None, :, None] * 8 + tl.arange(0, 2)[None, None, :]
    groups = columns.width // 64
    place = ranks.start + (block * groups + group).to(tl.int64) * 16 + in_block[None, None, :, :, :]
    known = (block < ranks.blocks) & (group < groups) & (in_block >= 0)[None, None, :, :, :]
    low, high = tl.split(tl.load(u_scale_ptr + place, mask=known, other=0.0).to(tl.int16, bitcast=True).to(tl.int32))
    return (low & 0xFFFF) | (high << 16)


@triton.jit
def _pairs_to_rows(pairs, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, RANK_STEP: tl.constexpr):
    """[GROUPS, RANK_STEP / 16, t, h] -> [BLOCK_N, ..], as :func:`_to_rows`."""
    rows = tl.broadcast_to(pairs[:, None, :, :, :], (GROUPS, BLOCK_N // GROUPS, RANK_STEP // 16, 4, 2))
    return tl.reshape(rows, (BLOCK_N, RANK_STEP // 16, 4, 2))


@triton.jit
def _fast_factor(u_ptr, u_start, blocks, rank_block, columns, scale, TILE: tl.constexpr):
    """Uᵀ of RANK_STEP ranks from 3-bit codes and scales of :func:`_pairs_to_rows`, fp16 [BLOCK_N, RANK_STEP].

    Two values an instruction and half of the registers; each is rounded once, so it is what fp32 would round to fp16.
    ``u_start`` and ``blocks`` are as in :func:`_up_rows`.
    """
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    RANK_STEP: tl.constexpr = TILE.RANK_STEP
    pairs = _up_pairs(u_ptr, u_start, blocks, rank_block, columns, TILE)
    if TILE.ASM:
        asm: tl.constexpr = (
            "{ .reg .b32 q, c; lop3.b32 q, $1, 0x00070007, 0x64006400, 0xEA; mov.b32 c, 0x64046404;"
            " sub.rn.f16x2 q, q, c; mul.rn.f16x2 $0, q, $2; }"
        )
        bits = tl.inline_asm_elementwise(asm, "=r,r,r", [pairs, scale], tl.int32, is_pure=True, pack=1)
        low, high = halves(bits, tl.float16)
    else:
        low_scale, high_scale = scale_and_zero(scale)
        low = (((pairs & 7) - 4).to(tl.float32) * low_scale).to(tl.float16)
        high = ((((pairs >> 16) & 7) - 4).to(tl.float32) * high_scale).to(tl.float16)
    return tl.reshape(tl.permute(tl.join(low, high), (0, 1, 3, 2, 4)), (BLOCK_N, RANK_STEP))


@triton.jit
def up_factor(compensators, ranks, columns, rank_block, dtype: tl.constexpr, TILE: tl.constexpr):
    """Uᵀ of RANK_STEP ranks of a part from ``rank_block`` on, in their order, ``dtype`` [BLOCK_N, RANK_STEP]."""
    groups: tl.constexpr = TILE.BLOCK_N // 64
    scale = _up_scales(
        compensators.u_scale, ranks, rank_block, columns, TILE.FACTOR_BITS, False, TILE.RANK_STEP, groups
    )  # fmt: skip
    u_start, blocks = ranks.start + columns.each * 0, ranks.blocks + columns.each * 0
    u = _up_codes(compensators.u, u_start, blocks, rank_block, columns, TILE, False)
    return _scaled(u, scale, groups, TILE).to(dtype)


@triton.jit
def _to_rows(scale, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, RANK_STEP: tl.constexpr):
    """[GROUPS, RANK_STEP] -> [BLOCK_N, RANK_STEP], each group's values for as many neighbouring rows."""
    return tl.reshape(tl.broadcast_to(scale[:, None, :], (GROUPS, BLOCK_N // GROUPS, RANK_STEP)), (BLOCK_N, RANK_STEP))


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
    few: tl.constexpr = bits == 3 and BLOCK_M <= FEW_TOKENS and TILE.BLOCK_N <= 128 and not fast
    rank_step: tl.constexpr = TILE.RANK_STEP
    step: tl.constexpr = rank_step // 16
    groups: tl.constexpr = TILE.BLOCK_N // 64
    stages: tl.constexpr = 2 if rank_step > 16 and TILE.DOWN_SPLITS == 1 else 1  # more splits have no room for two
    share = tl.cdiv(tl.cdiv(ranks.blocks, step), TILE.SPLIT_K) * step
    begin = split_index * share
    end = tl.minimum(begin + share, ranks.blocks)
    if few:
        return _add_few(acc, compensators, ranks, columns, counts, pairs, valid, begin, end, dtype, TILE, BLOCK_M)
    # scales are loaded a step ahead: Triton's pipeline takes no loads as narrow as these
    scale = _next_scales(compensators.u_scale, ranks, begin, columns, fast, warp, TILE)
    for block in tl.range(begin, end, step, num_stages=stages):
        next_scale = _next_scales(compensators.u_scale, ranks, block + step, columns, fast, warp, TILE)
        u_start, blocks = ranks.start + columns.each * 0, ranks.blocks + columns.each * 0
        if fast:
            rows = _pairs_to_rows(scale, groups, TILE.BLOCK_N, rank_step)
            u = _fast_factor(compensators.u, u_start, blocks, block, columns, rows, TILE)
        else:
            u = _up_codes(compensators.u, u_start, blocks, block, columns, TILE, warp)
            u = _scaled(u, scale, groups, TILE).to(dtype)
        scale = next_scale
        down = _load_down(
            compensators.down, ranks, block, counts, pairs, valid, TILE.DOWN_SPLITS, dtype, warp, BLOCK_M, rank_step
        )  # fmt: skip
        acc = finished(tl.dot(u, down, acc), TILE.ASM)
    return acc


@triton.jit
def _next_scales(u_scale_ptr, ranks, block, columns, FAST: tl.constexpr, WARP: tl.constexpr, TILE: tl.constexpr):
    """The scales of the ranks from ``block`` on, as :func:`_fast_factor` takes them or as :func:`_scaled` does."""
    groups: tl.constexpr = TILE.BLOCK_N // 64
    rank_step: tl.constexpr = TILE.RANK_STEP
    if FAST:
        scales = _scale_pairs(u_scale_ptr, ranks, block, columns, rank_step, groups)
    else:
        scales = _up_scales(u_scale_ptr, ranks, block, columns, TILE.FACTOR_BITS, WARP, rank_step, groups)
    return scales


@triton.jit
def add_gated_up_projection(
    acc, compensators, columns, is_up, counts, expert, pairs, valid, TILE: tl.constexpr, BLOCK_M: tl.constexpr
):
    """acc += Uᵀ·(V·x) where gate's columns and up's alternate: what both need is loaded before it is used."""
    bits: tl.constexpr = TILE.FACTOR_BITS
    warp: tl.constexpr = TILE.WARP_MMA or BLOCK_M < WARPGROUP_TOKENS
    splits: tl.constexpr = TILE.DOWN_SPLITS
    rank_step: tl.constexpr = TILE.RANK_STEP
    groups: tl.constexpr = TILE.BLOCK_N // 128 if TILE.BLOCK_N >= 128 else 1
    stages: tl.constexpr = 2 if rank_step > 16 and splits == 1 else 1  # more splits have no room for two
    gate = part_ranks(compensators, expert, 0, 2)
    up = part_ranks(compensators, expert, 1, 2)
    u_start = tl.where(is_up, up.start, gate.start)
    own_blocks = tl.where(is_up, up.blocks, gate.blocks)
    fast: tl.constexpr = bits == 3 and not warp
    for block in tl.range(0, tl.maximum(gate.blocks, up.blocks), rank_step // 16, num_stages=stages):
        gate_down = _load_down(
            compensators.down, gate, block, counts, pairs, valid, splits, tl.float16, warp, BLOCK_M, rank_step
        )  # fmt: skip
        up_down = _load_down(
            compensators.down, up, block, counts, pairs, valid, splits, tl.float16, warp, BLOCK_M, rank_step
        )  # fmt: skip
        if fast:
            gate_scale = _scale_pairs(compensators.u_scale, gate, block, columns, rank_step, groups)
            up_scale = _scale_pairs(compensators.u_scale, up, block, columns, rank_step, groups)
            scale = tl.where(
                is_up[:, None, None, None],
                _pairs_to_rows(up_scale, groups, TILE.BLOCK_N, rank_step),
                _pairs_to_rows(gate_scale, groups, TILE.BLOCK_N, rank_step),
            )
            u = _fast_factor(compensators.u, u_start, own_blocks, block, columns, scale, TILE)
        else:
            gate_scale = _up_scales(compensators.u_scale, gate, block, columns, bits, warp, rank_step, groups)
            up_scale = _up_scales(compensators.u_scale, up, block, columns, bits, warp, rank_step, groups)
            scale = tl.where(
                is_up[:, None],
                _to_rows(up_scale, groups, TILE.BLOCK_N, rank_step),
                _to_rows(gate_scale, groups, TILE.BLOCK_N, rank_step),
            )
            codes = _up_codes(compensators.u, u_start, own_blocks, block, columns, TILE, warp)
            u = (codes * scale).to(tl.float16)
        acc = tl.dot(tl.where(is_up[:, None], 0.0, u).to(tl.float16), gate_down, acc)
        acc = finished(tl.dot(tl.where(is_up[:, None], u, 0.0).to(tl.float16), up_down, acc), TILE.ASM)
    return acc
