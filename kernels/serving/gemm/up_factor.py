"""U of the compensators: which of it a tile reads, and how its codes become an operand."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .dequant import halves, operand_order, scale_and_zero


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
def _up_rows(ranks, rank_block, columns, RANK_STEP: tl.constexpr):
    """Rows of 16 ranks of U for RANK_STEP of them from ``rank_block`` on, and which there are, [BLOCK_N, .. / 16].

    Columns that are not inside have none, nor has a part more than its blocks of 16 ranks.
    """
    block = rank_block + tl.arange(0, RANK_STEP // 16)
    row = ranks.start // 16 * 64 + (block * columns.width).to(tl.int64)[None, :] + columns.each[:, None]
    return row, columns.inside[:, None] & (block < ranks.blocks)[None, :]


@triton.jit
def _up_words(u_ptr, ranks, rank_block, columns, TILE: tl.constexpr):
    """3-bit codes of :func:`_up_rows`, four in a word, int32 [BLOCK_N, RANK_STEP / 16, t]; 0 where there are none."""
    row, there = _up_rows(ranks, rank_block, columns, TILE.RANK_STEP)
    mask = there[:, :, None]
    lane = tl.arange(0, 4)
    place = u_ptr + row[:, :, None] * 4 + lane[None, None, :]
    return tl.load(place, mask=mask & (lane >= 0)[None, None, :], other=0x4444).to(tl.int32)


@triton.jit
def _by_warps(values):
    """[N, k] -> [row, warp, half, N / 64, k]: a warpgroup's threads in the order of its MMA's rows."""
    return tl.permute(tl.reshape(values, (values.shape[0] // 64, 4, 2, 8, values.shape[1])), (3, 1, 2, 0, 4))


@triton.jit
def _up_words_of_lanes(u_ptr, ranks, rank_block, columns, TILE: tl.constexpr):
    """As :func:`_up_words`, each word loaded by the thread whose MMA takes it.

    Otherwise a thread would load neighbouring words of a row, and what comes of them would change places through shared
    memory. Nothing tells Triton that a row's words are neighbours.
    """
    row, there = _up_rows(ranks, rank_block, columns, TILE.RANK_STEP)
    row = _by_warps(row)
    mask = _by_warps(there)
    lane = tl.arange(0, 4)
    if TILE.ASM:
        lane = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [lane], tl.int32, is_pure=True, pack=1)
    place = u_ptr + row[None, :, :, :, :, :] * 4 + lane[:, None, None, None, None, None]
    mask = mask[None, :, :, :, :, :] & (lane >= 0)[:, None, None, None, None, None]
    words = tl.load(place, mask=mask, other=0x4444).to(tl.int32)
    return tl.reshape(tl.permute(words, (4, 2, 3, 1, 5, 0)), (TILE.BLOCK_N, TILE.RANK_STEP // 16, 4))


@triton.jit
def _code_pairs(word):
    """The codes of :func:`_up_words` in pairs at bits 0 and 16, int32 [BLOCK_N, RANK_STEP / 16, t, h]."""
    pairs = word | (word << 12)  # the first two codes at bits 0 and 16, the others 8 higher
    return tl.join(pairs, pairs >> 8)


@triton.jit
def _up_codes(u_ptr, ranks, rank_block, columns, TILE: tl.constexpr, WARP: tl.constexpr):
    """Uᵀ of RANK_STEP ranks, not scaled yet, fp32 [BLOCK_N, RANK_STEP] in `operand_order`; see :func:`_up_words`."""
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    RANK_STEP: tl.constexpr = TILE.RANK_STEP
    if TILE.FACTOR_BITS == 3:
        word = _up_words(u_ptr, ranks, rank_block, columns, TILE)
        low = tl.join(word & 7, (word >> 4) & 7)
        high = tl.join((word >> 8) & 7, (word >> 12) & 7)
        joined = tl.join(low, high)  # [BLOCK_N, blocks, t, b, h]
        codes = tl.permute(joined, (0, 1, 2, 4, 3)) if WARP else tl.permute(joined, (0, 1, 4, 2, 3))
        return (tl.reshape(codes, (BLOCK_N, RANK_STEP)) - 4).to(tl.float32)
    row, there = _up_rows(ranks, rank_block, columns, RANK_STEP)
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
def few_factor(compensators, ranks, rank_block, columns, BF16: tl.constexpr, WARP: tl.constexpr, TILE: tl.constexpr):
    """U's codes of RANK_STEP ranks as :func:`_few_codes`, an operand [BLOCK_N, RANK_STEP]."""
    pairs = _code_pairs(_up_words(compensators.u, ranks, rank_block, columns, TILE))
    codes = _few_codes(pairs, BF16, TILE.ASM)  # [BLOCK_N, blocks, t, h, b]
    if not WARP:
        codes = tl.permute(codes, (0, 1, 3, 2, 4))
    return tl.reshape(codes, (TILE.BLOCK_N, TILE.RANK_STEP))


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
    block = rank_block + tl.arange(0, RANK_STEP // 16)[None, :, None, None]
    group = columns.first // 64 + tl.arange(0, GROUPS)[:, None, None, None]
    in_block = tl.arange(0, 4)[:, None] + tl.arange(0, 2)[None, :] * 4  # in words of two
    groups = columns.width // 64
    place = ranks.start // 2 + (block * groups + group).to(tl.int64) * 8 + in_block[None, None, :, :]
    known = (block < ranks.blocks) & (group < groups) & (in_block >= 0)[None, None, :, :]
    return tl.load(u_scale_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + place, mask=known, other=0)


@triton.jit
def _pairs_to_rows(pairs, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, RANK_STEP: tl.constexpr):
    """[GROUPS, RANK_STEP / 16, t, h] -> [BLOCK_N, ..], as :func:`_to_rows`."""
    rows = tl.broadcast_to(pairs[:, None, :, :, :], (GROUPS, BLOCK_N // GROUPS, RANK_STEP // 16, 4, 2))
    return tl.reshape(rows, (BLOCK_N, RANK_STEP // 16, 4, 2))


@triton.jit
def _fast_factor(u_ptr, ranks, rank_block, columns, scale, TILE: tl.constexpr):
    """Uᵀ of RANK_STEP ranks from 3-bit codes and scales of :func:`_pairs_to_rows`, fp16 [BLOCK_N, RANK_STEP].

    Two values an instruction and half of the registers; each is rounded once, so it is what fp32 would round to fp16.
    """
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    RANK_STEP: tl.constexpr = TILE.RANK_STEP
    if TILE.BLOCKS == "rows" and RANK_STEP > 16:  # a dense layer's loop has many turns, and is pipelined
        word = _up_words(u_ptr, ranks, rank_block, columns, TILE)
    else:
        word = _up_words_of_lanes(u_ptr, ranks, rank_block, columns, TILE)
    pairs = _code_pairs(word)
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
def next_scales(
    u_scale_ptr, ranks, block, columns,
    GROUPS: tl.constexpr, FAST: tl.constexpr, WARP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The scales of the ranks from ``block`` on, as :func:`_fast_factor` takes them or as :func:`_scaled` does."""
    rank_step: tl.constexpr = TILE.RANK_STEP
    if FAST:
        scales = _scale_pairs(u_scale_ptr, ranks, block, columns, rank_step, GROUPS)
    else:
        scales = _up_scales(u_scale_ptr, ranks, block, columns, TILE.FACTOR_BITS, WARP, rank_step, GROUPS)
    return scales


@triton.jit
def factor(
    u_ptr, ranks, block, columns, scale,
    dtype: tl.constexpr, FAST: tl.constexpr, WARP: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Uᵀ of the ranks from ``block`` on, ``dtype`` [BLOCK_N, RANK_STEP], by scales of :func:`next_scales`."""
    if FAST:
        rows = _pairs_to_rows(scale, GROUPS, TILE.BLOCK_N, TILE.RANK_STEP)
        u = _fast_factor(u_ptr, ranks, block, columns, rows, TILE)
    else:
        u = _scaled(_up_codes(u_ptr, ranks, block, columns, TILE, WARP), scale, GROUPS, TILE).to(dtype)
    return u


@triton.jit
def up_factor(compensators, ranks, columns, rank_block, dtype: tl.constexpr, TILE: tl.constexpr):
    """Uᵀ of RANK_STEP ranks of a part from ``rank_block`` on, in their order, ``dtype`` [BLOCK_N, RANK_STEP]."""
    groups: tl.constexpr = TILE.BLOCK_N // 64
    scale = _up_scales(
        compensators.u_scale, ranks, rank_block, columns, TILE.FACTOR_BITS, False, TILE.RANK_STEP, groups
    )  # fmt: skip
    u = _up_codes(compensators.u, ranks, rank_block, columns, TILE, False)
    return _scaled(u, scale, groups, TILE).to(dtype)


@triton.jit
def _to_rows(scale, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, RANK_STEP: tl.constexpr):
    """[GROUPS, RANK_STEP] -> [BLOCK_N, RANK_STEP], each group's values for as many neighbouring rows."""
    return tl.reshape(tl.broadcast_to(scale[:, None, :], (GROUPS, BLOCK_N // GROUPS, RANK_STEP)), (BLOCK_N, RANK_STEP))
