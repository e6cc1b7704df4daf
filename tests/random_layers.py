"""Random quantized layers and exact references for kernel tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from vllm_milo.kernels.packing import pack_codes
from vllm_milo.kernels.reference import ACTIVATIONS, expert_gemm
from vllm_milo.kernels.weights import (
    ExpertWeights,
    LinearSpec,
    LinearWeights,
    MoESpec,
    factor_elements,
    largest_rank,
    offsets,
)


def random_base(shape: Sequence[int], n: int, k: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed codes, scales, zeros; zeros include 0, 7, negative and fractional ones, scales huge and tiny ones."""
    packed = pack_codes(torch.randint(0, 8, (*shape, n, k), dtype=torch.uint8))
    groups = (*shape, n, k // group)
    scale = (torch.rand(groups) * 0.02 + 0.01) * torch.exp2(torch.randint(-3, 4, groups).float())
    special = torch.tensor([0.0, 7.0, -1.5, 3.4375, 10.0])
    zero = torch.where(torch.rand(groups) < 0.3, special[torch.randint(0, 5, groups)], torch.rand(groups) * 7)
    return packed, scale.half(), zero.half()


def random_factor(rows: int, columns: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank-major factor [rows, columns] and its scales."""
    if bits == 16:
        return torch.randn(rows, columns).bfloat16() * 0.1, torch.empty(0, 0, dtype=torch.float16)
    scale = (torch.rand(rows, columns // 64) * 0.02 + 0.01).half()
    if rows == 0:  # of a size that may fill no words
        return torch.zeros(0, factor_elements(columns, bits), dtype=torch.int8 if bits == 8 else torch.int32), scale
    if bits == 8:
        return torch.randint(-127, 128, (rows, columns), dtype=torch.int8), (scale / 30).half()
    return pack_codes(torch.randint(0, 8, (rows, columns), dtype=torch.uint8)), scale


def random_experts(ranks: Sequence[Sequence[int]], n: int, k: int, group: int, bits: int) -> ExpertWeights:
    """One expert GEMM; ``ranks[e][p]`` are the ranks, ``n`` counts all parts."""
    parts = len(ranks[0])
    flat = [rank for expert in ranks for rank in expert]
    u, u_scale = random_factor(sum(flat), n // parts, bits)
    v, v_scale = random_factor(sum(flat), k, bits)
    return ExpertWeights(
        *random_base((len(ranks),), n, k, group),
        u,
        u_scale,
        v,
        v_scale,
        torch.tensor(offsets(flat), dtype=torch.int32),
    )


def random_linear(
    widths: list[int], ranks: list[int], k: int, group: int, bits: int
) -> tuple[LinearWeights, LinearSpec]:
    """A linear layer of several parts."""
    factors = [random_factor(rank, width, bits) for rank, width in zip(ranks, widths, strict=True)]
    v, v_scale = random_factor(sum(ranks), k, bits)
    weights = LinearWeights(
        *random_base((), sum(widths), k, group),
        torch.cat([u.flatten() for u, _ in factors]),
        torch.cat([scale.flatten() for _, scale in factors]),
        v,
        v_scale,
    )
    return weights, LinearSpec(widths, ranks, group, bits)


def moe_spec(
    w13_ranks: Sequence[Sequence[int]],
    w2_ranks: Sequence[Sequence[int]],
    bits: int,
    activation: str = "silu",
    on_input: bool = False,
) -> MoESpec:
    """The spec of a layer with these ranks."""
    return MoESpec(bits, activation, on_input, [largest_rank(ranks) for ranks in (w13_ranks, w2_ranks)])


def exact_moe(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    local: dict[int, int],
    w13: ExpertWeights,
    w2: ExpertWeights,
    spec: MoESpec,
) -> torch.Tensor:
    """The layer in float64, one expert at a time, sharing nothing with the operator but the expert's matrix."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for name, expert in local.items():
        tokens, slots = (topk_ids == name).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        rows, weights = x[tokens].double(), topk_weights[tokens, slots].double()[:, None]
        if spec.router_weight_on_input:
            rows = rows * weights
        gate, up = expert_gemm(rows, w13, expert, spec).chunk(2, dim=-1)
        found = expert_gemm(ACTIVATIONS[spec.activation](gate) * up, w2, expert, spec)
        out.index_add_(0, tokens, found if spec.router_weight_on_input else found * weights)
    return out


def random_routing(tokens: int, top_k: int, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Router weights [T, k] and distinct expert ids [T, k]."""
    weights, ids = torch.topk(torch.rand(tokens, experts), top_k, dim=-1)
    return F.normalize(weights, p=1, dim=-1), ids.to(torch.int32)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|; NaN where anything is not finite."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))
