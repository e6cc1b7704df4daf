"""What vLLM's versions differ in, found by capability, never by number; and what is read from its configuration."""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.platforms import current_platform

_LAYERS = "vllm.model_executor.layers.fused_moe"


def routes_inside_method() -> bool:
    """Return whether a MoE method must do the routing itself.

    On the CPU, vLLM up to 0.31 has only routers that call CUDA operators; there a method is "monolithic":
    it gets router logits. Later versions have a CPU router.
    """
    return current_platform.is_cpu() and importlib.util.find_spec(f"{_LAYERS}.router.cpu_router") is None


def loads_fused_experts() -> bool:
    """Return whether vLLM loads unquantized experts from one 3-D tensor; older versions may pass over it silently."""
    mapping = getattr(RoutedExperts, "get_expert_mapping", None)
    return mapping is not None and "include_fused" in inspect.signature(mapping).parameters


def select_experts(layer: Any, x: torch.Tensor, router_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Route on the CPU where :func:`routes_inside_method`; return top-k weights and expert ids."""
    from vllm.model_executor.layers.fused_moe.cpu_fused_moe import select_experts

    return select_experts(
        hidden_states=x,
        router_logits=router_logits,
        top_k=layer.top_k,
        use_grouped_topk=layer.use_grouped_topk,
        renormalize=layer.renormalize,
        topk_group=layer.topk_group,
        num_expert_group=layer.num_expert_group,
        custom_routing_function=layer.custom_routing_function,
        scoring_func=layer.scoring_func,
        routed_scaling_factor=layer.routed_scaling_factor,
        e_score_correction_bias=layer.e_score_correction_bias,
    )


def loads_dummy_weights() -> bool:
    """Return whether the model under construction gets random weights (``--load-format dummy``)."""
    return get_current_vllm_config().load_config.load_format == "dummy"


def max_tokens() -> int:
    """Return the most tokens that the model under construction gets in a step."""
    return int(get_current_vllm_config().scheduler_config.max_num_batched_tokens)
