"""Routing that vLLM's CPU build leaves out, so that tests there can serve the families that need it.

Its router takes softmax alone and drops the correction bias where experts are in no groups; routers of GPUs do both.
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
