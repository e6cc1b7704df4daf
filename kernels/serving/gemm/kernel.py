"""The GEMM's kernel: which tile of which expert a program takes."""

from __future__ import annotations

import triton
import triton.language as tl

from ..blocks import block_expert, load_pairs, past_last_pair
from .arguments import Counts
from .tile import compute_gated_tile, compute_tile


@triton.jit(do_not_specialize=["num_pairs", "num_rows", "top_k", "max_blocks"])
def gemm_kernel(
    activations, weights, compensators, scales, output, blocks, shape,
    num_pairs, num_rows, top_k, max_rank, max_blocks, TILE: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_N outputs, BLOCK_M pairs] tile of one expert, over one of SPLIT_K parts of K.

    The parameters are those of :mod:`.arguments` and, as ``blocks``, :class:`..blocks.Blocks`; ``max_blocks`` are the
    blocks of the grid. GROUP_BLOCKS neighbouring blocks, mostly of one expert, go through the tiles together.

    Its steps in :mod:`..protocol` are ``GEMM`` and ``GEMM_ALONE``.
    """
    late_wait: tl.constexpr = TILE.PDL and TILE.HAS_RANK
    if TILE.PDL and not late_wait:
        tl.extra.cuda.gdc_wait()
    counts = Counts(num_pairs, num_rows, top_k, max_rank)
    if TILE.ACTIVATION != "":
        tiles = shape.n0 // (TILE.BLOCK_N // 2)
    else:
        tiles = tl.cdiv(shape.n0, TILE.BLOCK_N)
        if TILE.PARTS > 1:
            tiles += tl.cdiv(shape.n1, TILE.BLOCK_N)
        if TILE.PARTS > 2:
            tiles += tl.cdiv(shape.n2, TILE.BLOCK_N) + tl.cdiv(shape.n3, TILE.BLOCK_N)
    if TILE.GROUP_BLOCKS == 1:
        block = tl.program_id(0) // tiles
        tile = tl.program_id(0) % tiles
    else:
        in_group = tl.program_id(0) % (TILE.GROUP_BLOCKS * tiles)
        block = tl.program_id(0) // (TILE.GROUP_BLOCKS * tiles) * TILE.GROUP_BLOCKS
        group_blocks = tl.minimum(max_blocks - block, TILE.GROUP_BLOCKS)  # the last group may have less
        block += in_group % group_blocks
        tile = in_group // group_blocks
    split_index = tl.program_id(1)
    kind: tl.constexpr = TILE.BLOCKS
    tail_m: tl.constexpr = TILE.TAIL_M
    block_m: tl.constexpr = TILE.BLOCK_M
    expert = block_expert(blocks, block, max_blocks, TILE.HAS_MAP, kind)
    pairs = load_pairs(blocks, block, num_pairs, max_blocks, block_m, kind)
    if tail_m > 0:
        share: tl.constexpr = block_m // tail_m
        is_tail = past_last_pair(blocks, block * block_m + tail_m, num_pairs, max_blocks * block_m, kind)
        joined = False
        few_block = block
        if TILE.JOIN:
            after = block_expert(blocks, block + 1, max_blocks, TILE.HAS_MAP, kind)
            few_after = past_last_pair(blocks, (block + 1) * block_m + tail_m, num_pairs, max_blocks * block_m, kind)
            joined = (after == expert) & few_after
            few_block += joined.to(tl.int32)
            before = block_expert(blocks, tl.maximum(block - 1, 0), max_blocks, TILE.HAS_MAP, kind)
            expert = tl.where(is_tail & (block > 0) & (before == expert), -1, expert)  # the block before took them
        few_block *= share
        few = load_pairs(blocks, few_block, num_pairs, max_blocks * share, tail_m, kind)
    if expert < 0:
        # the protocol's rule 3: one program must wait, and others would be in tiles' places
        if late_wait:  # noqa: SIM102 (a constant, which Triton must see by itself)
            if tl.program_id(0) + tl.program_id(1) == 0:
                tl.extra.cuda.gdc_wait()
        return
    if tail_m > 0:
        if TILE.JOIN:  # noqa: SIM102 (likewise)
            if joined:
                _compute(
                    activations, weights, compensators, scales, output, blocks, shape, counts, max_blocks,
                    expert, block, pairs, few_block, few, tile, split_index, TILE, block_m, tail_m,
                )  # fmt: skip
                return
        if is_tail:
            _compute(
                activations, weights, compensators, scales, output, blocks, shape, counts, max_blocks * share,
                expert, few_block, few, few_block, few, tile, split_index, TILE, tail_m, 0,
            )  # fmt: skip
            return
    _compute(
        activations, weights, compensators, scales, output, blocks, shape, counts, max_blocks,
        expert, block, pairs, block, pairs, tile, split_index, TILE, block_m, 0,
    )  # fmt: skip


@triton.jit
def _compute(
    activations, weights, compensators, scales, output, blocks, shape, counts, max_blocks,
    expert, block, pairs, few_block, few, tile, split_index,
    TILE: tl.constexpr, BLOCK_M: tl.constexpr, FEW_M: tl.constexpr,
):  # fmt: skip
    """One tile, with or without the activation function, of the pairs of a block (in blocks of BLOCK_M).

    With FEW_M also of the ``few`` pairs of ``few_block`` (in blocks of FEW_M), by the same weights.
    """
    if TILE.ACTIVATION != "":
        compute_gated_tile(
            activations, weights, compensators, scales, output, blocks, shape, counts, max_blocks,
            expert, block, pairs, few_block, few, tile, split_index, TILE, BLOCK_M, FEW_M,
        )  # fmt: skip
    else:
        compute_tile(
            activations, weights, compensators, scales, output, blocks, shape, counts, max_blocks,
            expert, block, pairs, few_block, few, tile, split_index, TILE, BLOCK_M, FEW_M,
        )  # fmt: skip
