"""The routed experts of a layer, whose launches other layers of the same sizes have recorded (:mod:`.recording`)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch

from ..serving import fused_moe as direct
from ..serving.layout import KernelWeights
from ..serving.padding import padded
from ..weights import MoESpec
from .recording import replayed


def fused_moe(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    w13: list[torch.Tensor],
    w2: list[torch.Tensor],
    spec: MoESpec,
) -> torch.Tensor:
    """Return the routed experts' weighted sum, as :func:`..serving.fused_moe.fused_moe` with less work for the host."""
    call = partial(direct.fused_moe, x, topk_weights, topk_ids, expert_map, w13, w2, spec)
    return _replayed(call, (x, topk_weights, topk_ids, expert_map), (), w13, w2, spec)


def routed_moe(
    x: torch.Tensor,
    logits: torch.Tensor,
    padding: torch.Tensor | None,
    top_k: int,
    renormalizes: bool,
    expert_map: torch.Tensor | None,
    w13: list[torch.Tensor],
    w2: list[torch.Tensor],
    spec: MoESpec,
) -> torch.Tensor:
    """Return what :func:`..serving.fused_moe.routed_moe` does, likewise."""
    call = partial(direct.routed_moe, x, logits, padding, top_k, renormalizes, expert_map, w13, w2, spec)
    return _replayed(call, (x, logits, padding, expert_map), (top_k, renormalizes), w13, w2, spec)


def _replayed(
    call: Callable[[], torch.Tensor],
    routed: Sequence[torch.Tensor | None],
    how: Hashable,
    w13: list[torch.Tensor],
    w2: list[torch.Tensor],
    spec: MoESpec,
) -> torch.Tensor:
    """Return what ``call`` does with tensors, of which x is the first, weights and further values."""
    x = routed[0]
    assert x is not None
    if (
        spec.router_weight_on_input
        or padded(x.shape[1]) != x.shape[1]
        or not all(one is None or one.is_contiguous() for one in routed)
    ):
        return call()  # what torch computes before or after the launches is in no recording
    key = (
        *(None if one is None else (one.shape, one.dtype) for one in routed),
        how,
        _sizes(w13),
        _sizes(w2),
        tuple(tuple(one) if isinstance(one, list) else one for one in spec),
    )
    return replayed(call, key, (*routed, *w13, *w2), x.device)


def _sizes(weights: list[torch.Tensor]) -> Hashable:
    """Return what launches depend on in a GEMM's weights; of factors they take the addresses, whatever the ranks."""
    layer = KernelWeights(*weights)
    shapes = layer.packed.shape, layer.scale_zero.shape, layer.rank_blocks.shape
    return shapes, tuple(one.dtype for one in weights)
