"""StepFun's entries of the table of families: experts of a layer in three tensors, of gates, of ups and of downs."""

from __future__ import annotations

from .family import LATER_LAYERS, Family
from .slots import FusedTensor, attention, dense, shared

STEPFUN = (
    Family(
        "step3p5",
        "Step-3.5-Flash",
        (*attention(), *shared("share_expert"), *dense()),
        kept=("moe.gate", "self_attn.g_proj"),
        block="moe",
        fused=tuple(FusedTensor(f"{role}_proj.weight", (role,)) for role in ("gate", "up", "down")),
        num_experts_keys=("moe_num_experts",),
        ahead=(LATER_LAYERS,),
        layer_kinds_keys=("layer_types",),  # some have more heads of queries
        not_run="transformers has its class within Step-3.7's alone",
        note="no calibration text; vLLM's CPU build refuses its router's scores",
        status="served",
    ),
)
