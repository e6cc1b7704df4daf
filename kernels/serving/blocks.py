"""What a program reads of the pairs in blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .routing import Routes, TokenBlocks, local_expert


class Blocks(NamedTuple):
    """Where a kernel finds the pairs of a block and its expert: one parameter, whose fields are tensors or None.

    Attributes:
        pairs: as in :class:`.routing.TokenBlocks`.
        experts: likewise.
        num_blocks: likewise.
        ids: as in :class:`.routing.Routes`.
        expert_map: likewise.
    """

    pairs: Any
    experts: Any
    num_blocks: Any
    ids: Any
    expert_map: Any


def make_blocks(blocks: TokenBlocks, routes: Routes | None) -> Blocks:
    """Return what a kernel reads of ``blocks`` and ``routes``, which are None for a dense layer."""
    ids, expert_map = (None, None) if routes is None else routes
    return Blocks(blocks.pairs, blocks.experts, blocks.num_blocks, ids, expert_map)


@triton.jit
def load_pairs(blocks, block, num_pairs, max_blocks, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr):
    """Pair indexes of a block, num_pairs where there is none; anything in blocks that are not in use.

    BLOCKS: "sorted" by expert; "single": block b is pair b alone; "rows": BLOCK_M consecutive rows.
    """
    lane = tl.arange(0, BLOCK_M)
    if BLOCKS == "sorted":
        return tl.load(blocks.pairs + block * BLOCK_M + lane, mask=lane < (max_blocks - block) * BLOCK_M, other=0)
    if BLOCKS == "single":
        return tl.where(lane == 0, block, num_pairs)
    return tl.minimum(block * BLOCK_M + lane, num_pairs)


@triton.jit
def rows_of(pairs, num_pairs, top_k, SHARED_ROWS: tl.constexpr):
    """(row of x, whether there is one) of each pair; a division by a number that is not known is slow."""
    valid = pairs < num_pairs
    row = pairs // top_k if SHARED_ROWS else pairs
    return tl.where(valid, row, 0), valid


@triton.jit
def past_last_pair(blocks, index, num_pairs, last_index, BLOCKS: tl.constexpr):
    """Whether no pair stands at ``index`` of the sorted pairs or rows; within a block they stand in front."""
    if BLOCKS == "sorted":
        return tl.load(blocks.pairs + index, mask=index < last_index, other=0) >= num_pairs
    return index >= num_pairs


@triton.jit
def block_expert(blocks, block, max_blocks, HAS_MAP: tl.constexpr, BLOCKS: tl.constexpr):
    """Local expert of a block; -1 where the block is not in use.

    Both loads are issued at once. If the second needed the result of the first, every tile would start later by the
    time that a load takes.
    """
    exists = block < max_blocks
    if BLOCKS == "sorted":
        expert = tl.load(blocks.experts + block, mask=exists, other=-1)
        return tl.where(block < tl.load(blocks.num_blocks), expert, -1)
    if BLOCKS == "single":
        return local_expert(blocks.ids, blocks.expert_map, block, exists, HAS_MAP)
    return tl.where(exists, 0, -1)


def block_kind(blocks: TokenBlocks, routes: Routes | None) -> str:
    """Return which blocks the kernels read, in the words of :func:`load_pairs`."""
    if routes is None:
        return "rows"
    return "single" if blocks.pairs is None else "sorted"
