"""The compensators' down-projection V·x, before the GEMM that adds Uᵀ to it in its epilogue.

Every tile of the GEMM needs all of V·x, so it cannot be computed inside; but only its epilogue does, so the GEMM's
loop over K runs at the same time where launches start early.

Programs take parts of K. Who adds the parts (:func:`_finishes`): every tile of the GEMM for itself, or once and for
all the program of V·x that is done last. It knows by a counter, which the launch of :mod:`.prepare` sets to 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .dequant import code_operand, finished, scale_and_zero, scaled
from .launch import LaunchMode, launch
from .layout import KernelWeights
from .routing import Routes, TokenBlocks, local_expert

RANKS = 64
"""Ranks of a program: fewer would not be multiplied by a whole warpgroup, and take as long."""


class DownShape(NamedTuple):
    """What is known of a V·x before its input.

    Attributes:
        max_rank: largest rank of an expert, each part padded to 16; 0 for none.
        units: units of 128 inputs.
        split_k: parts of K of the GEMM that wants it.
    """

    max_rank: int
    units: int
    split_k: int


class Plan(NamedTuple):
    """How V·x is spread over programs.

    Attributes:
        block_m: pairs of a program.
        sub_blocks: so many are a block of the GEMM.
        blocks: blocks of ``block_m`` pairs, in use or not.
        rank_tiles: parts of the ranks.
        splits: parts of K, of ``chunk`` units each; the last ones may have less.
        chunk: units of a part.
        finish: whether the last program of a block and a rank tile adds the parts.
    """

    block_m: int
    sub_blocks: int
    blocks: int
    rank_tiles: int
    splits: int
    chunk: int
    finish: bool

    @property
    def counters(self) -> int:
        """Counters that the programs need."""
        return self.blocks * self.rank_tiles if self.finish else 0


class Projected(NamedTuple):
    """Input of a GEMM.

    Attributes:
        x: activations, 16 bits, [rows, K].
        sums: fp32 [K/128, rows, 128/g'], sums of x over g' = min(group_size, 64) columns.
        down: V·x, fp32 [splits, pairs, ranks], to be added over splits, or in x's dtype [1, pairs, ranks] where that
            is done or there is one part; None where no expert has rank.
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
    x_ptr, v_ptr, v_scale_ptr, rank_blocks_ptr, expert, rows, valid, slot, split, unit_chunk, K,
    PARTS: tl.constexpr, FACTOR_BITS: tl.constexpr, RANKS: tl.constexpr,
    BF16: tl.constexpr, ASM: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """V·x of the ranks ``slot`` of an expert over ``unit_chunk`` units of K, fp32 [RANKS, BLOCK_M]."""
    units = (K + 127) // 128
    begin = split * unit_chunk
    end = tl.minimum(begin + unit_chunk, units)
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
    return down


@triton.jit
def _finish(
    parts_ptr, counter_ptr, down_ptr, own, place, inside, split, splits, part_size,
    RANKS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Store ``own``, fp32 [RANKS, BLOCK_M], as one of ``splits`` parts; store their sum if it is the last of them.

    ``place`` [RANKS, BLOCK_M] is that in each part and in the sum. The parts are added in their order, all of them as
    memory has them, so that the same input gives the same bits whichever is last.
    """
    tl.store(parts_ptr + split * part_size + place, own, mask=inside)
    tl.debug_barrier()  # one thread counts for all of the program, once all have stored
    done = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    if done == splits - 1:
        down = tl.zeros((RANKS, BLOCK_M), tl.float32)
        for _ in tl.range(0, splits, loop_unroll_factor=128 // BLOCK_M):  # as many loads as registers have room for
            # from L2: the cache of this multiprocessor may not know what others wrote
            down += tl.load(parts_ptr + place, mask=inside, other=0.0, cache_modifier=".cg")
            parts_ptr += part_size
        tl.store(down_ptr + place, down.to(down_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["num_pairs", "top_k", "max_blocks", "unit_chunk", "splits", "rank_tiles"],
)
def _project_kernel(
    x_ptr, v_ptr, v_scale_ptr, rank_blocks_ptr, down_ptr, parts_ptr, counters_ptr,
    pairs_ptr, experts_ptr, num_blocks_ptr, ids_ptr, map_ptr,
    K, num_pairs, top_k, max_rank, max_blocks, unit_chunk, splits, rank_tiles,
    PARTS: tl.constexpr, FACTOR_BITS: tl.constexpr, RANKS: tl.constexpr,
    BF16: tl.constexpr, ASM: tl.constexpr, EVEN_K: tl.constexpr, HAS_MAP: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr, SUB_BLOCKS: tl.constexpr, STAGES: tl.constexpr, FINISH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """V·x of BLOCK_M pairs, RANKS ranks and ``unit_chunk`` units of K; SUB_BLOCKS of them are a block of the GEMM.

    FINISH: parts, fp32 [splits, num_pairs, max_rank], are added to down, 16 bits [num_pairs, max_rank], with counters
    int32 [blocks, rank_tiles] that start at 0 and end at ``splits`` where a block is in use. Else down are the parts.
    """
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
        valid = pairs < num_pairs
        rows = tl.where(valid, pairs // top_k, 0)
        slot = tile * RANKS + tl.arange(0, RANKS)
        down = _down_project(
            x_ptr, v_ptr, v_scale_ptr, rank_blocks_ptr, expert, rows, valid, slot, split, unit_chunk, K,
            PARTS, FACTOR_BITS, RANKS, BF16, ASM, EVEN_K, BLOCK_M, STAGES,
        )  # fmt: skip
        place = pairs[None, :].to(tl.int64) * max_rank + slot[:, None]
        inside = valid[None, :] & (slot < max_rank)[:, None]
        part_size = tl.cast(num_pairs, tl.int64) * max_rank
        if FINISH:
            counter_ptr = counters_ptr + block * rank_tiles + tile
            _finish(
                parts_ptr, counter_ptr, down_ptr, down, place, inside, split, splits, part_size, RANKS, BLOCK_M
            )  # fmt: skip
        else:
            tl.store(down_ptr + split * part_size + place, down.to(down_ptr.dtype.element_ty), mask=inside)


def block_kind(blocks: TokenBlocks, routes: Routes | None) -> str:
    """Return which blocks the kernels read, in the words of :func:`load_pairs`."""
    if routes is None:
        return "rows"
    return "single" if blocks.pairs is None else "sorted"


def _finishes(dense: bool, tile_m: int) -> bool:
    """Return whether programs of V·x add its parts, where there are several, for GEMM tiles of ``tile_m`` pairs.

    Else each tile adds them, of all the ranks that it takes: 4 bytes a part instead of 2 in all. The few ranks of
    experts are added faster for few pairs than the last program would do it, for which all tiles wait.
    """
    return dense or tile_m > 32


def _splits(dense: bool, tile_m: int, split_k: int, programs: int, units: int, early: bool) -> int:
    """Return the parts of K, were there ``programs`` programs for each.

    Beside the GEMM's loop programs have time, but each takes the place of one of its tiles (of ``tile_m`` pairs, one
    of ``split_k`` parts of K). With few tokens a program of V·x has a quarter of a tile's units, and at most eight, and
    is done in time. Dense layers have so many ranks that their GEMM waits for V·x anyway: it gets as many programs as
    run at once, as long as each has four units and the last ones have little to add.
    """
    filling = triton.cdiv(256 if early else 1024, programs)
    if dense:
        splits = min(512 // tile_m, units // 4, filling) if tile_m <= 64 else 1
    elif tile_m <= 32:
        splits = triton.next_power_of_2(max(4 * split_k, triton.cdiv(units, 8)))
    else:
        splits = 16 if filling >= 12 else 4 if filling >= 3 else 1
    splits = max(1, min(16, splits, 2 * units // 3))
    return 1 << (splits.bit_length() - 1)  # few different numbers: a GEMM that adds is compiled for each


def _stages(dense: bool, block_m: int) -> int:
    """Return the depth of the load pipeline: what there is room for, beside tiles of experts less."""
    if block_m <= 32:
        return 4
    return 3 if dense else 2


def plan(shape: DownShape, blocks: TokenBlocks, dense: bool, early: bool) -> Plan:
    """Return how V·x of ``blocks`` is spread over programs; those of a dense layer are its rows."""
    block_m = min(64, blocks.block_m)
    sub_blocks = blocks.block_m // block_m
    count = blocks.max_blocks * sub_blocks
    rank_tiles = triton.cdiv(shape.max_rank, RANKS)
    if rank_tiles == 0:
        return Plan(block_m, sub_blocks, count, 0, 1, shape.units, False)
    splits = _splits(dense, blocks.block_m, shape.split_k, count * rank_tiles, shape.units, early)
    finish = splits > 1 and _finishes(dense, blocks.block_m)
    return Plan(block_m, sub_blocks, count, rank_tiles, splits, triton.cdiv(shape.units, splits), finish)


def allocate_counters(plans: Sequence[Plan], device: torch.device) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return uninitialized counters, int32, as one buffer and as its parts for each plan."""
    # each part at a multiple of 16 bytes: kernels are compiled anew for other addresses
    sizes = [triton.cdiv(one.counters, 4) * 4 for one in plans]
    buffer = torch.empty(sum(sizes), dtype=torch.int32, device=device)
    return buffer, list(buffer.split(sizes))


def project(
    x: torch.Tensor,
    weights: KernelWeights,
    blocks: TokenBlocks,
    routes: Routes | None,
    top_k: int,
    factor_bits: int,
    shape: DownShape,
    counters: torch.Tensor,
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
        shape: of V·x.
        counters: int32, of :func:`.prepare.prepare` for this shape: 0 on the device by now, and for one use.
        mode: how to launch.
    """
    if shape.max_rank == 0:
        return None
    rows, k = x.shape
    num_pairs = rows if routes is None else routes.num_pairs
    num_experts = weights.packed.shape[0]
    how = plan(shape, blocks, routes is None, mode.early)
    parts = None
    if how.splits > 1:
        parts = torch.empty(how.splits, num_pairs, shape.max_rank, dtype=torch.float32, device=x.device)
    down = parts
    if down is None or how.finish:
        down = torch.empty(1, num_pairs, shape.max_rank, dtype=x.dtype, device=x.device)
    launch(
        _project_kernel,
        (how.blocks * how.splits * how.rank_tiles,),
        mode,
        x,
        weights.v,
        weights.v_scale,
        weights.rank_blocks,
        down,
        parts if how.finish else None,
        counters if how.finish else None,
        blocks.pairs,
        blocks.experts,
        blocks.num_blocks,
        None if routes is None else routes.ids,
        None if routes is None else routes.expert_map,
        k,
        num_pairs,
        top_k,
        shape.max_rank,
        blocks.max_blocks,
        how.chunk,
        how.splits,
        how.rank_tiles,
        PARTS=(weights.rank_blocks.shape[0] - 1) // num_experts,
        FACTOR_BITS=factor_bits,
        RANKS=RANKS,
        BF16=x.dtype == torch.bfloat16,
        ASM=mode.asm,
        EVEN_K=k % 128 == 0,
        HAS_MAP=routes is not None and routes.expert_map is not None,
        BLOCKS=block_kind(blocks, routes),
        BLOCK_M=how.block_m,
        SUB_BLOCKS=how.sub_blocks,
        STAGES=_stages(routes is None, how.block_m),
        FINISH=how.finish,
        PDL=mode.early,
        num_warps=4,
    )
    return down
