"""What a GEMM needs of its input before it starts, in one launch: sums over groups and the down-projection V·x.

Sums: the GEMM takes zero points off with them (see :mod:`.dequant`). V·x: every tile of the GEMM needs all of
it, so it cannot be computed inside. The sums of the second GEMM's input come with the activation that makes it,
which adds the first GEMM's split-K parts as well.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .dequant import code_operand, scale_and_zero, scaled
from .launch import LaunchMode
from .layout import UNIT, KernelWeights
from .routing import Routes, TokenBlocks, local_expert, sort_expert, sort_sizes


class Projected(NamedTuple):
    """Input of a GEMM.

    Attributes:
        x: activations, 16 bits, [rows, K].
        sums: fp32 [K/128, rows, 128/g'], sums of x over g' = min(group_size, 64) columns.
        down: V·x, fp32 [splits, pairs, ranks], to be added over splits; None where no expert has rank.
        row_scale: fp32 [rows]; x, sums and down are those of the activations divided by it. None for 1.
    """

    x: torch.Tensor
    sums: torch.Tensor
    down: torch.Tensor | None
    row_scale: torch.Tensor | None = None


@triton.jit
def load_pairs(pairs_ptr, block, num_pairs, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr):
    """Pair indexes of a block, num_pairs where there is none.

    BLOCKS: "sorted" by expert; "single": block b is pair b alone; "rows": BLOCK_M consecutive rows.
    """
    lane = tl.arange(0, BLOCK_M)
    if BLOCKS == "sorted":
        return tl.load(pairs_ptr + block * BLOCK_M + lane)
    if BLOCKS == "single":
        return tl.where(lane == 0, block, num_pairs)
    return tl.minimum(block * BLOCK_M + lane, num_pairs)


@triton.jit
def last_pair(pairs_ptr, index, num_pairs, BLOCKS: tl.constexpr):
    """Whether no pair stands at ``index`` of the sorted pairs; within a block they stand in front."""
    if BLOCKS == "sorted":
        return tl.load(pairs_ptr + index) >= num_pairs
    if BLOCKS == "single":
        return True
    return index >= num_pairs


@triton.jit
def block_expert(experts_ptr, num_blocks_ptr, ids_ptr, map_ptr, block, HAS_MAP: tl.constexpr, BLOCKS: tl.constexpr):
    """Local expert of a block; -1 where the block is not in use."""
    if BLOCKS == "sorted":
        in_use = block < tl.load(num_blocks_ptr)
        return tl.load(experts_ptr + block, mask=in_use, other=-1)
    if BLOCKS == "single":
        return local_expert(ids_ptr, map_ptr, block, True, HAS_MAP)
    return block * 0


@triton.jit
def _store_sums(sums_ptr, x_ptr, row_block, unit, K, num_rows, SUM: tl.constexpr, BLOCK_M: tl.constexpr):
    """Store the sums over SUM columns of one unit of BLOCK_M rows of x."""
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < num_rows
    k = unit * 128 + tl.arange(0, 128)
    place = x_ptr + rows[:, None].to(tl.int64) * K + k[None, :]
    x = tl.load(place, mask=valid[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
    per_unit: tl.constexpr = 128 // SUM
    sums = tl.sum(tl.reshape(x, (BLOCK_M, per_unit, SUM)), 2)
    target = sums_ptr + (unit * num_rows + rows.to(tl.int64))[:, None] * per_unit + tl.arange(0, per_unit)[None, :]
    tl.store(target, sums, mask=valid[:, None])


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
            down = tl.dot(scaled(codes1, scale1, four, 1, BF16), x1, down)
        else:
            v0 = tl.load(values, mask=in_rank[:, None], other=0).to(tl.float32) * scale0[:, None]
            v1 = tl.load(values + 64, mask=in_rank[:, None], other=0).to(tl.float32) * scale1[:, None]
            down = tl.dot(v0.to(x0.dtype), x0, down)
            down = tl.dot(v1.to(x1.dtype), x1, down)
        x_rows += 128
        scales += 16
        words += 192
        values += 128
    place = (split.to(tl.int64) * num_pairs + pairs)[None, :] * max_rank + slot[:, None]
    tl.store(down_ptr + place, down, mask=valid[None, :] & (slot < max_rank)[:, None])


@triton.jit
def _project_kernel(
    x_ptr, sums_ptr, v_ptr, v_scale_ptr, rank_blocks_ptr, down_ptr,
    pairs_ptr, experts_ptr, num_blocks_ptr, ids_ptr, map_ptr,
    K, num_pairs, num_rows, num_experts, top_k, max_rank, unit_chunk, splits, rank_tiles, down_programs, sum_programs,
    PARTS: tl.constexpr, SUM: tl.constexpr, FACTOR_BITS: tl.constexpr, RANKS: tl.constexpr,
    BF16: tl.constexpr, ASM: tl.constexpr, EVEN_K: tl.constexpr, HAS_MAP: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr, SUB_BLOCKS: tl.constexpr, STAGES: tl.constexpr,
    SORT_M: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Three jobs that do not need each other: V·x, sums of x, and (SORT_M > 0) sorting the pairs for the GEMMs."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    if program < down_programs:
        block = program // (splits * rank_tiles)
        split = program % splits
        tile = program // splits % rank_tiles
        expert = block_expert(experts_ptr, num_blocks_ptr, ids_ptr, map_ptr, block // SUB_BLOCKS, HAS_MAP, BLOCKS)
        if expert >= 0:
            pairs = load_pairs(pairs_ptr, block, num_pairs, BLOCK_M, BLOCKS)
            rows = tl.where(pairs < num_pairs, pairs // top_k, 0)
            _down_project(
                x_ptr, v_ptr, v_scale_ptr, rank_blocks_ptr, down_ptr, expert, pairs, rows, tile * RANKS, split,
                unit_chunk, K, num_pairs, max_rank, PARTS, FACTOR_BITS, RANKS, BF16, ASM, EVEN_K, BLOCK_M, STAGES,
            )  # fmt: skip
    elif program < down_programs + sum_programs:
        units = (K + 127) // 128
        index = program - down_programs
        _store_sums(sums_ptr, x_ptr, index // units, index % units, K, num_rows, SUM, 16)
    elif SORT_M > 0:
        sort_expert(
            ids_ptr, map_ptr, pairs_ptr, experts_ptr, num_blocks_ptr, program - down_programs - sum_programs,
            num_pairs, num_experts, HAS_MAP, SORT_M, BINS, CHUNK,
        )  # fmt: skip


def block_kind(blocks: TokenBlocks, routes: Routes | None) -> str:
    """Return which blocks the kernels read, in the words of :func:`load_pairs`."""
    if routes is None:
        return "rows"
    return "single" if blocks.pairs is None else "sorted"


def _unit_chunk(units: int, programs: int) -> int:
    """Return the units of K of one program: enough programs to fill a GPU, few splits for the GEMM to add."""
    splits = max(1, min(32, units // 2, triton.cdiv(1024, max(1, programs))))
    return triton.cdiv(units, splits)


def project(
    x: torch.Tensor,
    weights: KernelWeights,
    blocks: TokenBlocks,
    routes: Routes | None,
    top_k: int,
    group_size: int,
    factor_bits: int,
    max_rank: int,
    need_sums: bool,
    mode: LaunchMode,
    sort: bool = False,
    row_scale: torch.Tensor | None = None,
) -> Projected:
    """Return a GEMM's input with its sums and V·x.

    Args:
        x: activations, fp16 or bf16 [rows, K], contiguous; pair p reads row p // top_k.
        weights: the GEMM's weights.
        blocks: the pairs in the GEMM's blocks. Not read, but filled, if ``sort``.
        routes: where the pairs go; None for a dense layer, whose pairs are its rows.
        top_k: pairs that share a row of x.
        group_size: 32, 64 or 128.
        factor_bits: 3, 8 or 16.
        max_rank: largest rank of an expert, each part padded to 16; 0 for none.
        need_sums: whether the GEMM wants the sums.
        mode: how to launch.
        sort: sort the pairs in the same launch, each pair being projected by itself: right for few pairs.
        row_scale: fp32 [rows], if x holds the activations divided by it.
    """
    rows, k = x.shape
    units = triton.cdiv(k, UNIT)
    sum_size = min(group_size, 64)
    sums = torch.empty(units if need_sums else 0, rows, 128 // sum_size, dtype=torch.float32, device=x.device)
    num_pairs = rows if routes is None else routes.num_pairs
    num_experts = weights.packed.shape[0]
    kind = "single" if sort else block_kind(blocks, routes)
    block_m = 16 if kind == "single" else min(64, blocks.block_m)
    count = num_pairs if kind == "single" else blocks.max_blocks * (blocks.block_m // block_m)
    ranks = max(32, min(64, triton.next_power_of_2(max_rank)))
    rank_tiles = triton.cdiv(max_rank, ranks)
    chunk = _unit_chunk(units, count * rank_tiles)
    splits = triton.cdiv(units, chunk) if max_rank else 0
    down = torch.empty(splits, num_pairs, max_rank, dtype=torch.float32, device=x.device)
    bins, sort_chunk = sort_sizes(num_experts, num_pairs) if sort else (1, 1)
    down_programs = count * splits * rank_tiles
    sum_programs = triton.cdiv(rows, 16) * units if need_sums else 0
    programs = down_programs + sum_programs + (num_experts if sort else 0)
    if programs == 0:
        return Projected(x, sums, None, row_scale)
    _project_kernel[(programs,)](
        x,
        sums,
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
        rows,
        num_experts,
        top_k,
        max_rank,
        chunk,
        splits,
        rank_tiles,
        down_programs,
        sum_programs,
        PARTS=(weights.rank_blocks.shape[0] - 1) // num_experts,
        SUM=sum_size,
        FACTOR_BITS=factor_bits,
        RANKS=ranks,
        BF16=x.dtype == torch.bfloat16,
        ASM=mode.asm,
        EVEN_K=k % 128 == 0,
        HAS_MAP=routes is not None and routes.expert_map is not None,
        BLOCKS=kind,
        BLOCK_M=block_m,
        SUB_BLOCKS=1 if kind == "single" else blocks.block_m // block_m,
        STAGES=4 if block_m <= 16 else 2,
        SORT_M=blocks.block_m if sort else 0,
        BINS=bins,
        CHUNK=sort_chunk,
        PDL=mode.early,
        num_warps=4,
        **mode.options(),
    )
    return Projected(x, sums, down if max_rank else None, row_scale)
