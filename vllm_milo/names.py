"""Which role a matrix has by the last part of its module name, decided in one place. Pure Python.

The converter gives ranks by role, the plugin fuses layers by it, and the checkpoint's rank table has these names.
"""

from __future__ import annotations

EXPERT_PROJECTIONS = {
    "gate_proj": "gate",
    "w1": "gate",
    "up_proj": "up",
    "w3": "up",
    "down_proj": "down",
    "w2": "down",
}
"""Role of an FFN's projection by its name in the checkpoint. Mixtral, PhiMoE and vLLM's loader say w1, w3, w2."""

FUSED_LAYERS = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
}
"""Parts of vLLM's fused layers, in order; models list only some of them in ``packed_modules_mapping``."""

QKV_PARTS = FUSED_LAYERS["qkv_proj"]
"""The projections that read attention's input, in vLLM's order q, k, v."""

ROUTERS = ("gate", "router", "shared_expert_gate")
"""Layers that choose or weigh experts; they are never quantized."""


def leaf_of(module: str) -> str:
    """Return the last part of a module's name."""
    return module.rpartition(".")[2]
