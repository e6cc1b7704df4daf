"""What a program reads of the pairs in blocks."""

from __future__ import annotations

import triton
import triton.language as tl

from .routing import Routes, TokenBlocks, local_expert


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


def block_kind(blocks: TokenBlocks, routes: Routes | None) -> str:
    """Return which blocks the kernels read, in the words of :func:`load_pairs`."""
    if routes is None:
        return "rows"
    return "single" if blocks.pairs is None else "sorted"
