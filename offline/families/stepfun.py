"""StepFun's entries of the table of families: experts of a layer in three tensors, of gates, of ups and of downs."""

from __future__ import annotations

from dataclasses import replace

from ..nouns import Kind
from .family import LATER_LAYERS, Family
from .slots import Cut, FusedTensor, Slot, attention, dense, shared

_FUSED = tuple(FusedTensor(f"{role}_proj.weight", (role,)) for role in ("gate", "up", "down"))
_STEP_3_5 = Family(
    "step3p5",
    "Step-3.5-Flash",
    (*attention(), *shared("share_expert"), *dense()),
    kept=("moe.gate", "self_attn.g_proj"),
    block="moe",
    fused=_FUSED,
    num_experts_keys=("moe_num_experts",),
    ahead=(LATER_LAYERS,),
    layer_kinds_keys=("layer_types",),  # some have more heads of queries
    not_run="transformers has its class within Step-3.7's alone",
    note="no calibration text; vLLM's CPU build refuses its router's scores",
    status="served",
)
_STEP_3 = Family(
    "step3_text",
    "text models of Step-3",
    (
        Slot("self_attn.wq", Kind.ATTENTION),
        Slot("self_attn.o_proj", Kind.ATTENTION, Cut.INPUTS),
        *shared("share_expert"),
        *dense(),
    ),
    # vLLM copies parts of a latent of queries, keys and values by their share of one matrix
    kept=("moe.gate", *(f"self_attn.{part}_proj" for part in "qkv")),
    block="moe",
    fused=_FUSED,
    num_experts_keys=("moe_num_experts",),
    note="no calibration text: transformers has no class for it; queries, keys and values stay as they are",
    status="served",
)
STEPFUN = (
    _STEP_3_5,
    replace(
        _STEP_3_5,
        model_type="step3p7",
        example="Step-3.7-Flash",
        text_config=("text_config",),
        beside=("vision_model.", "vit_"),
        not_run="its class has another body in memory, and gates and ups of experts in one tensor",
        note="no calibration text; vLLM 0.32 reads its makers' configuration, not the one of transformers 5.19",
        status="converts",
    ),
    _STEP_3,
    replace(
        _STEP_3,
        model_type="step3_vl",
        example="Step-3",
        text_config=("text_config",),
        beside=("vision_model.", "vit_"),
    ),
)
