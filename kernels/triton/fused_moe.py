"""The routed experts of one layer on Triton: sort, two grouped GEMMs with compensators, weighted sum."""

from __future__ import annotations

import torch

from ..reference import local_expert_ids
from ..weights import MoESpec
from .activation import gate_up, weighted_sum
from .compensator import down_project, group_sums
from .expert_gemm import GemmConfig, expert_gemm
from .layout import KernelExperts
from .routing import TokenBlocks, sort_pairs


def fused_moe(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    w13: list[torch.Tensor],
    w2: list[torch.Tensor],
    spec: MoESpec,
) -> torch.Tensor:
    """Return the routed experts' weighted sum; arguments as in :func:`..reference.fused_moe`.

    ``w13`` and ``w2`` are :class:`.layout.KernelExperts`. Every shape depends on the shapes of the arguments
    alone, and nothing waits for the host, so the launches can be captured in a CUDA graph.
    """
    gate_up_weights, down_weights = KernelExperts(*w13), KernelExperts(*w2)
    tokens, top_k = topk_ids.shape
    if tokens == 0:
        return torch.empty_like(x)
    local_ids = local_expert_ids(topk_ids, expert_map).contiguous()
    x = x.contiguous()
    rows_per_pair = top_k
    if spec.router_weight_on_input:
        x = (x.unsqueeze(1) * topk_weights.unsqueeze(-1)).to(x.dtype).flatten(0, 1)
        rows_per_pair = 1
    num_experts = gate_up_weights.packed.shape[0]
    config = choose_config(tokens * top_k, num_experts)
    blocks = sort_pairs(local_ids, num_experts, config.block_m)
    y = _gemm(x, gate_up_weights, blocks, rows_per_pair, 2, spec, config)
    hidden = gate_up(y, spec.activation, x.dtype)
    y = _gemm(hidden, down_weights, blocks, 1, 1, spec, config)
    return weighted_sum(y, topk_weights.contiguous(), local_ids, not spec.router_weight_on_input, x.dtype)


def choose_config(num_pairs: int, num_experts: int) -> GemmConfig:
    """Return a tile for the mean number of pairs an expert has."""
    mean = num_pairs / num_experts
    block_m = 16 if mean <= 16 else 32 if mean <= 64 else 64
    return GemmConfig(block_m=block_m, block_n=64, split_k=1, num_warps=4, num_stages=3)


def _gemm(
    x: torch.Tensor,
    weights: KernelExperts,
    blocks: TokenBlocks,
    top_k: int,
    parts: int,
    spec: MoESpec,
    config: GemmConfig,
) -> torch.Tensor:
    x_sum = group_sums(x, spec.group_size)
    down = down_project(
        x,
        x_sum,
        weights,
        blocks,
        top_k,
        parts,
        spec.group_size,
        spec.factor_bits,
        max_rank=spec.max_ranks[2 - parts],
        splits=4,
    )
    return expert_gemm(x, x_sum, weights, down, blocks, top_k, parts, spec.group_size, spec.factor_bits, config)
