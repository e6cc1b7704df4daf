"""The operators in plain torch: the authority of every kernel test, and the path of CPUs.

All sums run in float32 (or in float64, where the activations are float64); only the result, and the hidden
activations between the two expert GEMMs, are rounded to the activations' dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .packing import dequantize, dequantize_factor
from .weights import STEP, UNGATED, ExpertWeights, LinearSpec, LinearWeights, MoESpec, factor_elements, offsets

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
"""Gated activations act(gate)·up, by vLLM's names."""
UNGATED_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu2_no_mul": lambda x: F.relu(x).square()}
"""Activations of experts without a gate, by vLLM's names."""
assert tuple(UNGATED_ACTIVATIONS) == UNGATED


def linear(x: torch.Tensor, weights: LinearWeights, spec: LinearSpec) -> torch.Tensor:
    """Return x·Wᵀ + (x·Vᵀ)·U with W = s·(q - z).

    Args:
        x: activations [..., K], any floating dtype.
        weights: the layer, in the checkpoint layout.
        spec: part widths and ranks.

    Returns:
        [..., sum(widths)] in the dtype of x.
    """
    wide = x.to(_sum_dtype(x))
    base = dequantize(weights.packed, weights.scale, weights.zero, spec.group_size, wide.dtype)
    out = wide @ base.T
    if sum(spec.ranks) == 0:
        return out.to(x.dtype)
    down = wide @ dequantize_factor(weights.v, weights.v_scale, spec.factor_bits, dtype=wide.dtype).T
    rows, columns = offsets(spec.ranks), offsets(spec.widths)
    for part, u in enumerate(_linear_up_factors(weights, spec, wide.dtype)):
        block = slice(columns[part], columns[part + 1])
        out[..., block] += down[..., rows[part] : rows[part + 1]] @ u
    return out.to(x.dtype)


def expand_linear(weights: LinearWeights, spec: LinearSpec, dtype: torch.dtype) -> torch.Tensor:
    """Return W + Uᵀ·V of a layer in the checkpoint layout, ``dtype`` [N, K], each value rounded once from float32."""
    wide = dequantize(weights.packed, weights.scale, weights.zero, spec.group_size)
    if sum(spec.ranks) == 0:
        return wide.to(dtype)
    v = dequantize_factor(weights.v, weights.v_scale, spec.factor_bits).split(spec.ranks)
    u = _linear_up_factors(weights, spec, wide.dtype)
    for block, u_part, v_part in zip(wide.split(spec.widths), u, v, strict=True):
        block += u_part.T @ v_part
    return wide.to(dtype)


def fused_moe(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    w13: ExpertWeights,
    w2: ExpertWeights,
    spec: MoESpec,
) -> torch.Tensor:
    """Return the routed experts' weighted sum for each token.

    Compensators read the same activations as the base GEMMs; w13's term is added before the activation,
    w2's before the router weight and the top-k sum. So are biases.

    Args:
        x: activations [T, H].
        topk_weights: router weights [T, k].
        topk_ids: global expert ids [T, k]; negative ids, and experts of other ranks, add nothing.
        expert_map: int [global experts] -> local expert or -1; None if all experts are local.
        w13: gate and up projections, [E, 2I, ·].
        w2: down projections, [E, H, ·].
        spec: factor bits, activation, where the router weight applies.

    Returns:
        [T, H] in the dtype of x.
    """
    local_ids = local_expert_ids(topk_ids, expert_map)
    router_weights = topk_weights.to(_sum_dtype(x))
    out = torch.zeros(x.shape, dtype=_sum_dtype(x), device=x.device)
    for expert in range(w13.packed.shape[0]):
        tokens, slots = torch.where(local_ids == expert)
        if tokens.numel() == 0:
            continue
        rows = x[tokens].to(out.dtype)
        weight = router_weights[tokens, slots].unsqueeze(-1)
        if spec.router_weight_on_input:
            rows = (rows * weight).to(x.dtype).to(out.dtype)
        hidden = activate(expert_gemm(rows, w13, expert, spec), spec).to(x.dtype).to(out.dtype)
        result = expert_gemm(hidden, w2, expert, spec)
        out.index_add_(0, tokens, result if spec.router_weight_on_input else result * weight)
    return out.to(x.dtype)


def choose(
    logits: torch.Tensor, padding: torch.Tensor | None, top_k: int, renormalizes: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights fp32 [T, k] and ids int32 [T, k] of the experts of tokens, the first of equals first.

    Args:
        logits: of the router, [T, experts].
        padding: bool [T], rows that are no token's, whose ids are -1 and weights 0; None if all are tokens.
        top_k: experts of a token, k.
        renormalizes: whether a token's weights sum to 1; else they are its softmax over all experts.
    """
    ids = logits.float().argsort(dim=1, descending=True, stable=True)[:, :top_k]
    weights = logits.float().softmax(1).gather(1, ids)
    if renormalizes:
        weights /= weights.sum(1, keepdim=True)
    if padding is not None:
        ids, weights = ids.masked_fill(padding[:, None], -1), weights.masked_fill(padding[:, None], 0)
    return weights, ids.int()


def activate(y: torch.Tensor, spec: MoESpec) -> torch.Tensor:
    """Return the hidden activations [.., I] of gate and up [.., 2I], or of up alone [.., I], in the dtype of ``y``."""
    if not spec.is_gated:
        return UNGATED_ACTIVATIONS[spec.activation](y)
    gate, up = y.chunk(2, dim=-1)
    if spec.activation == STEP:
        return F.silu(gate).clamp(max=spec.limit) * up.clamp(-spec.limit, spec.limit)
    if spec.limit:
        gate, up = gate.clamp(max=spec.limit), up.clamp(-spec.limit, spec.limit)
    if spec.activation == "silu" and (spec.alpha, spec.beta) != (1.0, 0.0):
        return gate * torch.sigmoid(spec.alpha * gate) * (up + spec.beta)
    return ACTIVATIONS[spec.activation](gate) * up


def expert_gemm(rows: torch.Tensor, weights: ExpertWeights, expert: int, spec: MoESpec) -> torch.Tensor:
    """Return rows·Wᵀ + (rows·Vᵀ)·U + b for one expert: [M, K] -> [M, N] in the dtype of ``rows``."""
    packed, scale, zero = (tensor[expert] for tensor in (weights.packed, weights.scale, weights.zero))
    base = dequantize(packed, scale, zero, weights.group_size, rows.dtype)
    out = rows @ base.T
    if weights.bias is not None:
        out = out + weights.bias[expert].to(out.dtype)
    factors = expert_factors(weights, expert, spec.factor_bits, rows.dtype)
    if not factors:
        return out
    return out + torch.cat([(rows @ v.T) @ u for u, v in factors], dim=-1)


def expert_factors(
    weights: ExpertWeights, expert: int, factor_bits: int, dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return (U [r, N/P], V [r, K]) of each part of one expert; empty where no expert has rank."""
    if weights.u.shape[0] == 0:
        return []
    bounds = weights.rank_offsets.tolist()
    parts = (len(bounds) - 1) // weights.packed.shape[0]
    factors = []
    for part in range(expert * parts, (expert + 1) * parts):
        rows = slice(bounds[part], bounds[part + 1])
        u_scale, v_scale = (weights.u_scale[rows], weights.v_scale[rows]) if factor_bits != 16 else (None, None)
        u = dequantize_factor(weights.u[rows], u_scale, factor_bits, dtype=dtype)
        factors.append((u, dequantize_factor(weights.v[rows], v_scale, factor_bits, dtype=dtype)))
    return factors


def _linear_up_factors(weights: LinearWeights, spec: LinearSpec, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return U [rᵢ, Nᵢ] of each part."""
    elements = [factor_elements(width, spec.factor_bits) for width in spec.widths]
    starts = offsets([rank * row for rank, row in zip(spec.ranks, elements, strict=True)])
    scale_starts = offsets([rank * (width // 64) for rank, width in zip(spec.ranks, spec.widths, strict=True)])
    factors = []
    for part, rank in enumerate(spec.ranks):
        if rank == 0:  # such a part may have widths that fill no words or groups
            factors.append(torch.zeros(0, spec.widths[part], dtype=dtype, device=weights.u.device))
            continue
        u = weights.u[starts[part] : starts[part + 1]].view(rank, elements[part])
        scale = None
        if spec.factor_bits != 16:
            scale = weights.u_scale[scale_starts[part] : scale_starts[part + 1]].view(rank, spec.widths[part] // 64)
        factors.append(dequantize_factor(u, scale, spec.factor_bits, dtype=dtype))
    return factors


def local_expert_ids(topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    """Return the local expert of each pair, negative where the expert is not local or the id is negative."""
    if expert_map is None:
        return topk_ids
    local = expert_map[topk_ids.clamp(min=0).long()]
    return torch.where(topk_ids >= 0, local, -1)


def _sum_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
