"""Sorts (token, expert) pairs by expert into blocks that one GEMM tile takes, without a host sync."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..sizes import cdiv, next_power_of_2

WHOLE = 64
"""Most pairs of a block that V·x takes whole; it takes a larger one in pieces, of which a block by itself has none."""


class Routes(NamedTuple):
    """Which experts the tokens go to.

    Attributes:
        ids: int [T, k], contiguous, global expert of each pair; negative ids go nowhere.
        expert_map: int32 [global experts], local expert or -1; None if all experts are local.
    """

    ids: torch.Tensor
    expert_map: torch.Tensor | None

    @property
    def num_pairs(self) -> int:
        """T·k."""
        return self.ids.numel()


class TokenBlocks(NamedTuple):
    """Pairs sorted by local expert, every expert padded to whole blocks.

    ``pairs`` is None where each pair is a block by itself, in order (a single token); the kernels then read
    the routes.

    Attributes:
        pairs: int32 [max_blocks·block_m], pair index, or num_pairs in padding.
        experts: int32 [max_blocks], local expert of a block.
        num_blocks: int32 [1], blocks in use; the rest is never read.
        max_blocks: upper bound of blocks, known without the device.
        block_m: pairs of a block.
    """

    pairs: torch.Tensor | None
    experts: torch.Tensor | None
    num_blocks: torch.Tensor | None
    max_blocks: int
    block_m: int


@triton.jit
def local_expert(ids_ptr, map_ptr, pair, mask, HAS_MAP: tl.constexpr):
    """Local expert of pairs; -1 where it is not local, the id is negative or the mask is off."""
    ids = tl.load(ids_ptr + pair, mask=mask, other=-1).to(tl.int32)
    if HAS_MAP:
        return tl.load(map_ptr + ids, mask=ids >= 0, other=-1).to(tl.int32)
    return ids


@triton.jit
def find_blocks(num_blocks_ptr, bins, counts, expert, BLOCK_M: tl.constexpr):
    """Return an expert's first block, and how many blocks and pairs it has, by all experts' numbers and pairs.

    The program of expert 0 stores how many blocks there are.
    """
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(bins < expert, blocks, 0))
    own_blocks = tl.sum(tl.where(bins == expert, blocks, 0))
    own_pairs = tl.sum(tl.where(bins == expert, counts, 0))
    if expert == 0:
        tl.store(num_blocks_ptr, tl.sum(blocks))
    return first, own_blocks, own_pairs


@triton.jit
def end_blocks(
    pairs_ptr, experts_ptr, expert, first, own_blocks, own_pairs, num_pairs, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Fill an expert's last block with pairs of nobody, and write whose its blocks are."""
    pad = own_pairs + tl.arange(0, BLOCK_M)
    tl.store(pairs_ptr + first * BLOCK_M + pad, num_pairs, mask=pad < own_blocks * BLOCK_M)
    for start in range(0, own_blocks, 128):
        block = start + tl.arange(0, 128)
        tl.store(experts_ptr + first + block, expert, mask=block < own_blocks)


@triton.jit
def sort_expert(
    ids_ptr, map_ptr, pairs_ptr, experts_ptr, num_blocks_ptr, expert, num_pairs, num_experts,
    HAS_MAP: tl.constexpr, BLOCK_M: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the blocks of one expert. Every program counts all experts' pairs, so that none waits for another.

    An expert's pairs stand in the order of (pair % CHUNK, pair // CHUNK): each place of a chunk counts its own, and all
    places are added up once.
    """
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    own = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, num_pairs, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        local = local_expert(ids_ptr, map_ptr, pair, pair < num_pairs, HAS_MAP)
        counts += tl.histogram(local, BINS, mask=local >= 0)
        own += (local == expert).to(tl.int32)
    first, own_blocks, own_pairs = find_blocks(num_blocks_ptr, bins, counts, expert, BLOCK_M)
    place = first * BLOCK_M + tl.cumsum(own, 0) - own
    for start in range(0, num_pairs, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        mine = local_expert(ids_ptr, map_ptr, pair, pair < num_pairs, HAS_MAP) == expert
        tl.store(pairs_ptr + place, pair, mask=mine)
        place += mine.to(tl.int32)
    end_blocks(pairs_ptr, experts_ptr, expert, first, own_blocks, own_pairs, num_pairs, BLOCK_M)


def allocate_blocks(routes: Routes, num_experts: int, block_m: int) -> TokenBlocks:
    """Return uninitialized blocks for the sort to fill; a single token needs none, but in far too large tiles."""
    num_pairs, device = routes.num_pairs, routes.ids.device
    if routes.ids.shape[0] == 1 and block_m <= WHOLE:
        return TokenBlocks(None, None, None, num_pairs, block_m)
    max_blocks = min(num_pairs, num_experts + num_pairs // block_m)
    # one buffer, each part at a multiple of 16 bytes: kernels are compiled anew for other addresses
    room = cdiv(max_blocks, 4) * 4
    buffer = torch.empty(max_blocks * block_m + room + 1, dtype=torch.int32, device=device)
    pairs, experts, number = buffer.split([max_blocks * block_m, room, 1])
    return TokenBlocks(pairs, experts[:max_blocks], number, max_blocks, block_m)


def sort_sizes(num_experts: int, num_pairs: int) -> tuple[int, int]:
    """Return BINS and CHUNK of :func:`sort_expert`."""
    chunk = next((size for size in (64, 512, 2048) if num_pairs <= size), 4096)
    return count_bins(num_experts), chunk


def count_bins(num_experts: int) -> int:
    """Return the power of two that holds all experts, of which a histogram needs two."""
    return next_power_of_2(max(2, num_experts))
