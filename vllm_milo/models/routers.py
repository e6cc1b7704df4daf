"""Routers whose part a layer of experts may take: those that choose the largest of a softmax, and nothing else."""

from __future__ import annotations

import os
from typing import Any

from vllm_milo import compat

VARIABLE = "VLLM_MILO_ROUTING"
"""Set to 0, vLLM chooses experts."""
_OTHERS = ("custom_routing_function", "e_score_correction_bias", "hash_indices_table")
"""Attributes of a layer that let more than logits decide where they are not None."""
_RENORMALIZES = {"Default": False, "Renormalize": True, "RenormalizeNaive": True}
"""By vLLM's names of routing methods."""


def plain_router(layer: Any) -> bool | None:
    """Return whether the weights that a layer's router gives a token sum to 1, where it takes the largest of a softmax.

    None where :data:`VARIABLE` forbids it, where the router does anything else, on other devices than NVIDIA's
    GPUs, and where vLLM must see what is chosen: for adapters on experts, for groups of processes with tokens of their
    own, and for those who ask which experts were chosen.

    Args:
        layer: vLLM's, while it is made.
    """
    if os.environ.get(VARIABLE) == "0" or not compat.runs_on_nvidia():
        return None
    softmax = getattr(layer, "scoring_func", None) == "softmax" and getattr(layer, "routed_scaling_factor", 1) == 1
    alone = all(getattr(layer, name, None) is None for name in _OTHERS)
    # a version of vLLM without these attributes keeps what they say elsewhere
    ungrouped = hasattr(layer, "custom_routing_function") and getattr(layer, "use_grouped_topk", None) is False
    if not (softmax and alone and ungrouped) or _is_watched(layer.moe_config):
        return None
    return _RENORMALIZES.get(getattr(getattr(layer.moe_config, "routing_method", None), "name", ""))


def _is_watched(moe: Any) -> bool:
    """Return whether vLLM must see what the routers of the model under construction choose."""
    return bool(
        moe.is_lora_enabled
        or moe.moe_parallel_config.dp_size > 1
        or getattr(moe.moe_parallel_config, "pcp_size", 1) > 1
        or getattr(moe, "require_decomposed_backend", False)
        or compat.returns_choices()
    )
