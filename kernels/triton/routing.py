"""Sorts (token, expert) pairs by expert into blocks that one GEMM tile takes. Static shapes, no host sync."""

from __future__ import annotations

from typing import NamedTuple

import torch


class TokenBlocks(NamedTuple):
    """Pairs sorted by local expert, every expert padded to whole blocks.

    Attributes:
        pairs: int32 [max_blocks·block_m], pair index, or num_pairs in padding.
        experts: int32 [max_blocks], local expert of a block.
        num_blocks: int32 [1], blocks in use; the rest is never read.
        num_pairs: tokens·top_k.
        block_m: pairs of a block.
    """

    pairs: torch.Tensor
    experts: torch.Tensor
    num_blocks: torch.Tensor
    num_pairs: int
    block_m: int


def sort_pairs(local_ids: torch.Tensor, num_experts: int, block_m: int) -> TokenBlocks:
    """Sort pairs by expert.

    Args:
        local_ids: int [T, k], local expert of each pair; negative where the expert is not local.
        num_experts: local experts.
        block_m: pairs of a block.
    """
    ids = local_ids.flatten().to(torch.int64)
    ids = torch.where(ids < 0, num_experts, ids)
    device, num_pairs = ids.device, ids.numel()
    max_blocks = min(num_pairs, num_experts + num_pairs // block_m)
    experts, order = torch.sort(ids, stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=device).scatter_add_(0, ids, torch.ones_like(ids))
    blocks = (counts + block_m - 1) // block_m
    ends = blocks[:num_experts].cumsum(0)
    first_block = torch.nn.functional.pad(ends, (1, 0))
    first_pair = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    place = first_block[experts] * block_m + torch.arange(num_pairs, device=device) - first_pair[experts]
    # pairs of other processes' experts go to one spare slot behind the end
    place = torch.where(experts < num_experts, place, max_blocks * block_m)
    pairs = torch.full((max_blocks * block_m + 1,), num_pairs, dtype=torch.int32, device=device)
    pairs.scatter_(0, place, order.to(torch.int32))
    number = torch.arange(max_blocks, device=device)
    block_experts = torch.searchsorted(ends, number, right=True).clamp_(max=num_experts - 1)
    return TokenBlocks(pairs[:-1], block_experts.to(torch.int32), ends[-1:].to(torch.int32), num_pairs, block_m)
