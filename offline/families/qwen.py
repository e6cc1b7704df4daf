"""Qwen's entries of the table of families, and those of families like them.

Some are models for images and sound around a text model: their entries also say where that is, and what is beside it.
"""

from __future__ import annotations

from dataclasses import replace

from ..nouns import Kind
from .family import Family
from .slots import FUSED, Cut, Slot, attention, dense, shared

_SERVED = "served"
_KEEPS_IN_PROJ = "linear attention's inner projections stay as they are"
_EITHER = ("num_experts", "num_local_experts")

_QWEN3_5 = Family(
    "qwen3_5_moe_text",
    "text models of Qwen3.5, Qwen3.6 (35B-A3B, 122B-A10B)",
    (
        *attention(),
        Slot("linear_attn.out_proj", Kind.ATTENTION, Cut.INPUTS),
        *shared("mlp.shared_expert"),
        *dense(),
    ),
    kept=(
        "mlp.gate",
        "mlp.shared_expert_gate",
        *(f"linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a")),
    ),
    ahead=("mtp.",),
    mixers=("self_attn", "linear_attn"),
    note=_KEEPS_IN_PROJ,
    status=_SERVED,
)

QWEN = (
    Family(
        "qwen2_moe",
        "Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
        (*attention(), *shared("mlp.shared_expert"), *dense()),
        kept=("mlp.gate", "mlp.shared_expert_gate"),
        status=_SERVED,
    ),
    Family(
        "qwen3_moe",
        "Qwen3-30B-A3B, Qwen3-235B-A22B",
        (*attention(), *dense()),
        num_experts_keys=_EITHER,
        status=_SERVED,
    ),
    Family(
        "qwen3_next",
        "Qwen3-Next-80B-A3B",
        (
            *attention(),
            Slot("linear_attn.in_proj_qkvz", Kind.ATTENTION),
            Slot("linear_attn.out_proj", Kind.ATTENTION, Cut.INPUTS),
            *shared("mlp.shared_expert"),
            *dense(),
        ),
        kept=("mlp.gate", "mlp.shared_expert_gate", "linear_attn.in_proj_ba"),
        ahead=("mtp.",),
        mixers=("self_attn", "linear_attn"),
        status=_SERVED,
    ),
    _QWEN3_5,
    Family("olmoe", "OLMoE-1B-7B", attention(), num_experts_keys=_EITHER, status=_SERVED),
    Family("flex_olmo", "FlexOlmo-7x7B", attention(), status=_SERVED),
    Family(
        "mellum",
        "Mellum",
        (*attention(), *dense()),
        num_experts_keys=_EITHER,
        status=_SERVED,
    ),
    replace(
        _QWEN3_5,
        model_type="qwen3_5_moe",
        example="Qwen3.5, Qwen3.6 with images (35B-A3B, 122B-A10B, 397B-A17B)",
        body="model.language_model",
        text_config=("text_config",),
        beside=("model.visual.",),
    ),
    Family(
        "qwen3_vl_moe",
        "Qwen3-VL-30B-A3B, 235B-A22B",
        (*attention(), *dense()),
        fused=tuple(tensor._replace(transposed=True) for tensor in FUSED),
        only_fused=True,
        num_experts_keys=_EITHER,
        body="model.language_model",
        text_config=("text_config",),
        beside=("model.visual.",),
        status=_SERVED,
    ),
    Family(
        "qwen3_omni_moe",
        "Qwen3-Omni-30B-A3B",
        (*attention(), *dense()),
        num_experts_keys=_EITHER,
        body="thinker.model",
        head="thinker.lm_head",
        text_config=("thinker_config", "text_config"),
        beside=("thinker.visual.", "thinker.audio_tower.", "talker.", "code2wav."),
        note="what speaks stays as it is",
        status=_SERVED,
    ),
)
