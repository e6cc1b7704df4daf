"""Routing that vLLM's CPU build leaves out, so that tests there can serve the families that need it.

Its router takes softmax alone and drops the correction bias where experts are in no groups; routers of GPUs do both.
Of the router that also chooses among experts without weights (LongCat-Flash) it lacks the operators.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

ROUTER = "vllm.model_executor.layers.fused_moe.router.cpu_router"
"""The module, which older versions of vLLM lack."""


def choose(
    logits: torch.Tensor, top_k: int, scoring: str, bias: torch.Tensor | None, renormalize: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights (float32) and indices (int32) [T, top_k] of experts: the bias chooses them, but does not weigh."""
    scores = {"softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid}[scoring](logits.float())
    ids = (scores if bias is None else scores + bias).topk(top_k).indices
    weights = scores.gather(1, ids)
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights) * scale, ids.int()


def _choose_among_all(
    gating_output: torch.Tensor,
    e_score_correction_bias: torch.Tensor,
    topk: int,
    renormalize: bool,
    scoring_func: str,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``fused_topk_bias``."""
    return choose(gating_output, topk, scoring_func, e_score_correction_bias, renormalize, 1.0)


def _identities(
    expert_indices: torch.Tensor,
    expert_scales: torch.Tensor,
    num_experts: int,
    zero_expert_type: str,
    hidden_states: torch.Tensor,
) -> torch.Tensor:
    """As ``zero_experts_compute_triton``: what experts without weights, which come last, hand on of their inputs."""
    assert zero_expert_type == "identity"
    weight = expert_scales.masked_fill(expert_indices < num_experts, 0.0).sum(-1, keepdim=True)
    return (hidden_states * weight).to(hidden_states.dtype)


def mend() -> None:
    """Let vLLM's router of CPUs compute what it leaves out; what it can, it goes on to do itself."""
    router: Any = importlib.import_module(ROUTER).CPURouter
    theirs = router._compute_routing

    def route(self: Any, hidden_states: torch.Tensor, logits: torch.Tensor, *others: Any, **options: Any) -> Any:
        plain = self.custom_routing_function is None and not self.use_grouped_topk
        bias, scoring = self.e_score_correction_bias, self.scoring_func
        if plain and (scoring == "sigmoid" or (scoring == "softmax" and bias is not None)):
            return choose(logits, self.top_k, scoring, bias, self.renormalize, self.routed_scaling_factor)
        return theirs(self, hidden_states, logits, *others, **options)

    router._compute_routing = route
    if not hasattr(torch.ops._moe_C, "topk_softmax"):
        among_all: Any = importlib.import_module(ROUTER.replace("cpu_router", "zero_expert_router"))
        among_all.fused_topk_bias, among_all.zero_experts_compute_triton = _choose_among_all, _identities
