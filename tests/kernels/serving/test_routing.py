"""The sort of pairs into blocks of one expert each."""

from __future__ import annotations

import pytest
import torch

from vllm_milo.kernels.launch import launch_mode
from vllm_milo.kernels.serving.prepare import prepare
from vllm_milo.kernels.serving.routing import Routes, TokenBlocks, sort_sizes

CASES = {
    "one expert": (1, 70, 1, 16),
    "a pair for each of few experts": (128, 2, 8, 8),
    "fewer pairs than experts and blocks": (128, 16, 8, 8),
    "few experts": (8, 37, 2, 16),
    "more pairs than a chunk of 512": (16, 100, 6, 64),
    "a chunk of 4096": (40, 300, 8, 32),
    "more than that": (5, 4100, 2, 128),
    "more than 128 blocks of an expert": (3, 1400, 2, 8),
}
"""Experts, tokens, experts of a token, pairs of a block."""


def blocks_of(ids: torch.Tensor, expert_map: torch.Tensor | None, experts: int, block_m: int) -> TokenBlocks:
    """Return the sorted pairs, on the CPU."""
    x = torch.zeros(ids.shape[0], 64, dtype=torch.float16, device=ids.device)
    mode = launch_mode(ids.device, few_tokens=True)
    blocks = prepare(x, Routes(ids, expert_map), experts, block_m, 64, False, False, False, [], mode)[1]
    return TokenBlocks(*(field.cpu() if isinstance(field, torch.Tensor) else field for field in blocks))


def check(blocks: TokenBlocks, local: torch.Tensor, experts: int) -> None:
    """Check the blocks of pairs whose local experts are given, -1 for none."""
    assert blocks.pairs is not None
    assert blocks.experts is not None
    assert blocks.num_blocks is not None
    number = int(blocks.num_blocks)
    assert number <= blocks.max_blocks
    assert number == sum(-(-int(pairs) // blocks.block_m) for pairs in local[local >= 0].bincount())
    owners = blocks.experts[:number]
    rows = blocks.pairs.view(-1, blocks.block_m)[:number]
    for expert in range(experts):
        mine = (local == expert).nonzero().flatten()
        own = (owners == expert).nonzero().flatten()
        needed = -(-len(mine) // blocks.block_m)
        assert own.tolist() == list(range(int(own[0]), int(own[0]) + needed)) if needed else len(own) == 0
        found = rows[own].flatten()
        assert torch.equal(found[: len(mine)].sort().values, mine.int())  # pairs stand in front
        assert (found[len(mine) :] == local.numel()).all()


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["even", "one expert has most", "none local", "expert map"])
def test_each_expert_has_its_pairs_in_blocks_of_its_own(name: str, kind: str, kernel_device: str):
    experts, tokens, top_k, block_m = CASES[name]
    torch.manual_seed(0)
    ids = torch.rand(tokens, experts).topk(top_k, dim=1).indices.int()
    expert_map, local = None, ids.flatten().long()
    if kind == "one expert has most":
        ids[torch.rand(ids.shape) < 0.9] = experts // 2
        ids[0, 0] = -1
        local = ids.flatten().long()
    elif kind == "none local":
        ids = torch.full_like(ids, -1)
        local = ids.flatten().long()
    elif kind == "expert map":
        expert_map = torch.full((experts,), -1, dtype=torch.int32)
        kept = max(1, experts // 2)
        expert_map[torch.randperm(experts)[:kept]] = torch.arange(kept, dtype=torch.int32)
        local, experts = expert_map[local].long(), kept
        expert_map = expert_map.to(kernel_device)
    check(blocks_of(ids.to(kernel_device), expert_map, experts, block_m), local, experts)


def test_every_chunk_is_taken():
    sizes = {sort_sizes(experts, tokens * top_k)[1] for experts, tokens, top_k, _ in CASES.values()}
    assert sizes == {64, 512, 2048, 4096}
