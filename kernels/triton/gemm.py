"""GEMM on 3-bit weights, grouped by expert or dense, with the compensators' up-projection in the epilogue.

Operands are swapped: weights are the MMA's A operand (rows of outputs), tokens its B operand, since at decode
an expert has few tokens, and because dequantized weights then go from registers into the MMA. See
:mod:`.dequant` for the arithmetic and :mod:`.layout` for the weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .dequant import add_group, code_operand, fast_operand, quarter_operand, scale_and_zero, scaled
from .launch import LaunchMode
from .layout import KernelWeights
from .project import Projected, block_expert, last_pair, load_pairs
from .routing import Routes, TokenBlocks

MAX_PARTS = 4
MAX_EXACT_TOKENS = 32
"""Tails of at most so many tokens scale the products, whatever the whole tiles do."""


class GemmConfig(NamedTuple):
    """A tile and how it is run.

    Attributes:
        block_m: tokens of a tile.
        block_n: outputs of a tile.
        split_k: parts of K that are computed apart and added by the consumer.
        scaled: scale the weights in registers (many tokens) instead of the products (few tokens).
        num_warps: warps of a tile.
        num_stages: depth of the load pipeline.
        group_blocks: neighbouring token blocks that go through the outputs together.
        tail_m: size of the smaller tile for an expert's last pairs; 0 for none.
        max_registers: cap on a thread's registers, so that more tiles fit; None for no cap.
    """

    block_m: int
    block_n: int
    split_k: int
    scaled: bool
    num_warps: int
    num_stages: int
    group_blocks: int = 1
    tail_m: int = 0
    max_registers: int | None = None

    @property
    def needs_sums(self) -> bool:
        """Whether the GEMM reads the sums of its input: scaled weights hold the zero points already."""
        return not self.scaled or 0 < self.tail_m <= MAX_EXACT_TOKENS


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
def _up_operand(
    u_ptr, u_scale_ptr, u_start, rank_block, columns, inside, width, dtype: tl.constexpr,
    FACTOR_BITS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Uᵀ of 16 ranks as an operand [BLOCK_N, 16], scaled in fp32 and rounded once."""
    scale_base = u_scale_ptr + u_start + (rank_block * (width // 64)).to(tl.int64) * 16
    base = (u_start // 16 * 64 + (rank_block * width).to(tl.int64)) * (4 if FACTOR_BITS == 3 else 16)
    rank = tl.arange(0, 16)
    if FACTOR_BITS == 3:
        lane = tl.arange(0, 4)
        place = u_ptr + base + columns[:, None] * 4 + lane[None, :]
        word = tl.load(place, mask=inside[:, None] & (lane >= 0)[None, :], other=0).to(tl.int32)
        low = tl.join(word & 7, (word >> 4) & 7)
        high = tl.join((word >> 8) & 7, (word >> 12) & 7)
        codes = tl.reshape(tl.permute(tl.join(low, high), (0, 3, 1, 2)), (BLOCK_N, 16))  # h, t, b
        u = (codes - 4).to(tl.float32)
    else:
        place = u_ptr + base + columns[:, None] * 16 + rank[None, :]
        u = tl.load(place, mask=inside[:, None] & (rank >= 0)[None, :], other=0).to(tl.float32)
    if FACTOR_BITS != 16:
        place = scale_base + (columns // 64)[:, None] * 16 + rank[None, :]
        u *= tl.load(place, mask=inside[:, None] & (rank >= 0)[None, :], other=0.0).to(tl.float32)
    return u.to(dtype)


@triton.jit
def _add_up_projection(
    acc, u_ptr, u_scale_ptr, rank_blocks_ptr, u_starts_ptr, down_ptr, slot, first_slot, columns, inside, width,
    pairs, valid, num_pairs, max_rank, DOWN_SPLITS: tl.constexpr, dtype: tl.constexpr,
    FACTOR_BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """acc += Uᵀ·(V·x) for this tile. ``slot`` is the part of the expert, ``first_slot`` the expert's first."""
    first = tl.load(rank_blocks_ptr + slot)
    blocks = tl.load(rank_blocks_ptr + slot + 1) - first
    ranks_before = (first - tl.load(rank_blocks_ptr + first_slot)) * 16
    u_start = tl.load(u_starts_ptr + slot)
    for block in tl.range(0, blocks, num_stages=1):
        u = _up_operand(u_ptr, u_scale_ptr, u_start, block, columns, inside, width, dtype, FACTOR_BITS, BLOCK_N)
        rank = ranks_before + block * 16 + tl.arange(0, 16)
        down = tl.zeros((16, BLOCK_M), tl.float32)
        for split in tl.static_range(DOWN_SPLITS):
            source = down_ptr + (split * num_pairs + pairs)[None, :].to(tl.int64) * max_rank + rank[:, None]
            down += tl.load(source, mask=valid[None, :] & (rank >= 0)[:, None], other=0.0)
        acc = tl.dot(u, down.to(dtype), acc)
    return acc


@triton.jit
def _tile(
    x_ptr, sums_ptr, packed_ptr, scale_zero_ptr, u_ptr, u_scale_ptr, rank_blocks_ptr, u_starts_ptr, down_ptr,
    row_scale_ptr, out_ptr, expert, pairs, tile, split_index,
    N, K, n0, n1, n2, n3, num_pairs, num_rows, top_k, max_rank,
    PARTS: tl.constexpr, GROUP: tl.constexpr, FACTOR_BITS: tl.constexpr, HAS_RANK: tl.constexpr,
    DOWN_SPLITS: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr,
    SCALE: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, HAS_ROW_SCALE: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of :func:`_gemm_kernel`, for BLOCK_M pairs."""
    valid = pairs < num_pairs
    rows = tl.where(valid, pairs // top_k, 0)
    part, start, tile_column, width = _tile_part(tile, n0, n1, n2, n3, BLOCK_N)
    column = tile_column + tl.arange(0, BLOCK_N)
    inside = column < width
    if EVEN_N:
        inside = column >= 0
    n = start + column

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
                acc = tl.dot(fast_operand(w0, w1, w2, word0, 0, ASM, BLOCK_N), x0, acc)
                acc = tl.dot(fast_operand(w0, w1, w2, word1, 1, ASM, BLOCK_N), x1, acc)
            else:
                scale0, zero0 = scale_and_zero(word0)
                scale1, zero1 = scale_and_zero(word1)
                codes0 = code_operand(w0, w1, w2, 0, BF16, wide, ASM, BLOCK_N)
                codes1 = code_operand(w0, w1, w2, 1, BF16, wide, ASM, BLOCK_N)
                if SCALE == "weights":
                    acc = tl.dot(scaled(codes0, scale0, zero0, 0, BF16), x0, acc)
                    acc = tl.dot(scaled(codes1, scale1, zero1, 1, BF16), x1, acc)
                else:
                    sum0, sum1 = tl.split(tl.load(sums))
                    acc = add_group(acc, tl.dot(codes0, x0), sum0, scale0, zero0, 0, BF16)
                    acc = add_group(acc, tl.dot(codes1, x1), sum1, scale1, zero1, 1, BF16)
        words += 12 * N
        scales += N * groups
        x_rows += 128
        sums += num_rows * sums_per_unit

    if PDL:  # not sooner: what is launched next would take the place of this launch's own tiles
        tl.extra.cuda.gdc_launch_dependents()
    if HAS_RANK:  # noqa: SIM102 (a constant, which Triton must see by itself)
        if split_index == 0:
            acc = _add_up_projection(
                acc, u_ptr, u_scale_ptr, rank_blocks_ptr, u_starts_ptr, down_ptr,
                expert * PARTS + part, expert * PARTS, column, inside, width, pairs, valid, num_pairs, max_rank,
                DOWN_SPLITS, x_ptr.dtype.element_ty, FACTOR_BITS, BLOCK_N, BLOCK_M,
            )  # fmt: skip
    if HAS_ROW_SCALE:
        acc *= tl.load(row_scale_ptr + rows)[None, :]
    target = (split_index.to(tl.int64) * num_pairs + pairs)[None, :] * N + n[:, None]
    tl.store(out_ptr + target, acc.to(out_ptr.dtype.element_ty), mask=valid[None, :] & inside[:, None])


@triton.jit
def _gemm_kernel(
    x_ptr, sums_ptr, packed_ptr, scale_zero_ptr, u_ptr, u_scale_ptr, rank_blocks_ptr, u_starts_ptr, down_ptr,
    row_scale_ptr, out_ptr, pairs_ptr, experts_ptr, num_blocks_ptr, ids_ptr, map_ptr,
    N, K, n0, n1, n2, n3, num_pairs, num_rows, top_k, max_rank, max_blocks,
    PARTS: tl.constexpr, GROUP: tl.constexpr, FACTOR_BITS: tl.constexpr, HAS_RANK: tl.constexpr,
    DOWN_SPLITS: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr, HAS_MAP: tl.constexpr, BLOCKS: tl.constexpr,
    SCALE: tl.constexpr, TAIL_SCALE: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_M: tl.constexpr, SPLIT_K: tl.constexpr, STAGES: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_N outputs, BLOCK_M pairs] tile of one expert, over one of SPLIT_K parts of K.

    x [num_rows, K] in 16 bits; pair p reads row p // top_k; out [SPLIT_K, num_pairs, N]; sums and down as in
    :class:`.project.Projected`; weights as in :class:`.layout.KernelWeights`. Parts are n0.. columns wide, and
    no tile holds columns of two. EVEN_N: all are multiples of BLOCK_N. EVEN_K: K is one of 128. GROUP_BLOCKS
    neighbouring blocks, mostly of one expert, go through the tiles together and share the weights in the cache.
    SCALE: what is scaled, "products", "weights" or "fast" (weights in fp16), see :mod:`.dequant`. HAS_ROW_SCALE:
    x holds the rows of the activations divided by row_scale. TAIL_M > 0: a block with at most so many pairs, an
    expert's last, runs as a tile of that size.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    tiles = tl.cdiv(n0, BLOCK_N) + tl.cdiv(n1, BLOCK_N) + tl.cdiv(n2, BLOCK_N) + tl.cdiv(n3, BLOCK_N)
    in_group = tl.program_id(0) % (GROUP_BLOCKS * tiles)
    block = tl.program_id(0) // (GROUP_BLOCKS * tiles) * GROUP_BLOCKS + in_group % GROUP_BLOCKS
    tile = in_group // GROUP_BLOCKS
    split_index = tl.program_id(1)
    if BLOCKS != "sorted" and block >= max_blocks:
        return
    expert = block_expert(experts_ptr, num_blocks_ptr, ids_ptr, map_ptr, block, HAS_MAP, BLOCKS)
    if expert < 0:
        return
    pairs = load_pairs(pairs_ptr, block, num_pairs, BLOCK_M, BLOCKS)
    if TAIL_M == 0:
        _tile(
            x_ptr, sums_ptr, packed_ptr, scale_zero_ptr, u_ptr, u_scale_ptr, rank_blocks_ptr, u_starts_ptr, down_ptr,
            row_scale_ptr, out_ptr, expert, pairs, tile, split_index,
            N, K, n0, n1, n2, n3, num_pairs, num_rows, top_k, max_rank,
            PARTS, GROUP, FACTOR_BITS, HAS_RANK, DOWN_SPLITS, BF16, ASM, SCALE, EVEN_N, EVEN_K, HAS_ROW_SCALE, PDL,
            BLOCK_M, BLOCK_N, SPLIT_K, STAGES,
        )  # fmt: skip
    elif last_pair(pairs_ptr, block * BLOCK_M + TAIL_M, num_pairs, BLOCKS):
        few = load_pairs(pairs_ptr, block * (BLOCK_M // TAIL_M), num_pairs, TAIL_M, BLOCKS)
        _tile(
            x_ptr, sums_ptr, packed_ptr, scale_zero_ptr, u_ptr, u_scale_ptr, rank_blocks_ptr, u_starts_ptr, down_ptr,
            row_scale_ptr, out_ptr, expert, few, tile, split_index,
            N, K, n0, n1, n2, n3, num_pairs, num_rows, top_k, max_rank,
            PARTS, GROUP, FACTOR_BITS, HAS_RANK, DOWN_SPLITS, BF16, ASM, TAIL_SCALE, EVEN_N, EVEN_K, HAS_ROW_SCALE, PDL,
            TAIL_M, BLOCK_N, SPLIT_K, STAGES,
        )  # fmt: skip
    else:
        _tile(
            x_ptr, sums_ptr, packed_ptr, scale_zero_ptr, u_ptr, u_scale_ptr, rank_blocks_ptr, u_starts_ptr, down_ptr,
            row_scale_ptr, out_ptr, expert, pairs, tile, split_index,
            N, K, n0, n1, n2, n3, num_pairs, num_rows, top_k, max_rank,
            PARTS, GROUP, FACTOR_BITS, HAS_RANK, DOWN_SPLITS, BF16, ASM, SCALE, EVEN_N, EVEN_K, HAS_ROW_SCALE, PDL,
            BLOCK_M, BLOCK_N, SPLIT_K, STAGES,
        )  # fmt: skip


def gemm(
    source: Projected,
    weights: KernelWeights,
    widths: list[int],
    blocks: TokenBlocks,
    routes: Routes | None,
    top_k: int,
    group_size: int,
    factor_bits: int,
    config: GemmConfig,
    mode: LaunchMode,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Launch the GEMM.

    Args:
        source: activations, fp16 or bf16 [rows, K], contiguous, with their sums and V·x; pair p reads row p // top_k.
        weights: the experts, or the dense layer, in the kernel layout.
        widths: outputs of each part, at most four, multiples of 64.
        blocks: the pairs in blocks of ``config.block_m``.
        routes: where the pairs go; None for a dense layer, whose pairs are its rows.
        top_k: pairs that share a row of x.
        group_size: 32, 64 or 128.
        factor_bits: 3, 8 or 16.
        config: the tile.
        mode: how to launch.
        dtype: of the result: that of the activations, which x may hold in another (``source.row_scale``).

    Returns:
        [split_k, pairs, N]: ``dtype`` if split_k is 1, else fp32 partial sums. Rows of pairs whose
        expert is not local are not written.

    Raises:
        ValueError: shapes, dtypes or the tile do not fit.
    """
    x, n = source.x, weights.columns
    rows, k = x.shape
    _check(x, weights, widths, blocks, group_size, config)
    pairs = rows if routes is None else routes.num_pairs
    out = torch.empty(config.split_k, pairs, n, dtype=dtype if config.split_k == 1 else torch.float32, device=x.device)
    scale = "products"
    if config.scaled and group_size != 32:
        scale = "weights" if source.row_scale is None else "fast"
    tiles = sum(triton.cdiv(width, config.block_n) for width in widths)
    kind = "rows" if routes is None else "single" if blocks.pairs is None else "sorted"
    group_blocks = config.group_blocks
    _gemm_kernel[(tiles * triton.cdiv(blocks.max_blocks, group_blocks) * group_blocks, config.split_k)](
        x,
        source.sums,
        weights.packed,
        weights.scale_zero,
        weights.u,
        weights.u_scale,
        weights.rank_blocks,
        weights.u_starts,
        source.down,
        source.row_scale,
        out,
        blocks.pairs,
        blocks.experts,
        blocks.num_blocks,
        None if routes is None else routes.ids,
        None if routes is None else routes.expert_map,
        n,
        k,
        *widths,
        *[0] * (MAX_PARTS - len(widths)),
        pairs,
        rows,
        top_k,
        0 if source.down is None else source.down.shape[2],
        blocks.max_blocks,
        PARTS=len(widths),
        GROUP=group_size,
        FACTOR_BITS=factor_bits,
        HAS_RANK=source.down is not None,
        DOWN_SPLITS=1 if source.down is None else source.down.shape[0],
        BF16=x.dtype == torch.bfloat16,
        ASM=mode.asm,
        HAS_MAP=routes is not None and routes.expert_map is not None,
        BLOCKS=kind,
        SCALE=scale,
        TAIL_SCALE=scale if config.tail_m > MAX_EXACT_TOKENS else "products",
        HAS_ROW_SCALE=source.row_scale is not None,
        EVEN_N=all(width % config.block_n == 0 for width in widths),
        EVEN_K=k % 128 == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        TAIL_M=config.tail_m if config.tail_m < config.block_m else 0,
        SPLIT_K=config.split_k,
        STAGES=config.num_stages,
        GROUP_BLOCKS=group_blocks,
        PDL=mode.early,
        num_warps=config.num_warps,
        maxnreg=config.max_registers,
        **mode.options(),
    )
    return out


def _check(
    x: torch.Tensor,
    weights: KernelWeights,
    widths: list[int],
    blocks: TokenBlocks,
    group_size: int,
    config: GemmConfig,
) -> None:
    k = x.shape[1]
    if x.dtype not in (torch.float16, torch.bfloat16) or not x.is_contiguous():
        raise ValueError(f"x must be contiguous fp16 or bf16, found {x.dtype} with strides {x.stride()}")
    if weights.units != triton.cdiv(k, 128) or k % group_size:
        raise ValueError(
            f"weights have {weights.units} units of 128 inputs in groups of {group_size}, but x {k} columns"
        )
    if sum(widths) != weights.columns or not 1 <= len(widths) <= MAX_PARTS:
        raise ValueError(
            f"parts of {widths} outputs (at most {MAX_PARTS} parts), but the weights have {weights.columns}"
        )
    if config.block_n % 64:
        raise ValueError(f"block_n must be a multiple of 64, found {config.block_n}")
    if blocks.block_m != config.block_m:
        raise ValueError(f"pairs are in blocks of {blocks.block_m}, the tile has {config.block_m}")
