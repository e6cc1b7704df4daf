"""Ant's entries of the table of families, which their files call bailing, and those of families built like them."""

from __future__ import annotations

from dataclasses import replace

from ..nouns import Kind
from .family import LATER_LAYERS, Family
from .slots import Cut, Slot, dense, latent_attention, shared

_NO_CLASS = "no calibration text: transformers has no class for it"
_FUSED = (Slot("attention.query_key_value", Kind.ATTENTION), Slot("attention.dense", Kind.ATTENTION, Cut.INPUTS))
_BAILING = Family(
    "bailing_moe",
    "Ling-mini-2.0, Ling-flash-2.0, Ring-2.0, Ling-lite",
    (*_FUSED, *shared(), *dense()),
    ahead=(LATER_LAYERS,),
    mixers=("attention",),
    embed="word_embeddings",
    note=_NO_CLASS,
    status="served",
)
# vLLM fuses what reads Ling-3's linear attention with a matrix of a row for each head; gates may have as few rows
_KEPT = tuple(f"attention.{part}_proj" for part in "qkvbfg")
_LING = replace(
    _BAILING,
    model_type="bailing_hybrid",
    example="Ling-2.5, Ring-2.5, Ling-2.6, Ling-3",
    slots=(
        *_FUSED,
        *(slot for slot in latent_attention("attention") if slot.name not in _KEPT),
        *shared(),
        *dense(),
    ),
    kept=("mlp.gate", *_KEPT),
    ahead=(LATER_LAYERS, "model.mtp"),
    mixers=tuple(f"attention.{part}" for part in ("query_key_value", "q_conv1d", "kv_a_proj_with_mqa")),
    note=f"{_NO_CLASS}; gates, and what Ling-3's linear attention reads, stay as they are; vLLM's CPU build loads "
    "Ling-3, and lacks its linear attention",
)
BAILING = (
    _BAILING,
    replace(_BAILING, model_type="bailing_moe_v2"),
    _LING,
    replace(
        _LING,
        model_type="bailing_moe_v3_vl",
        example="Ling-3 with images",
        text_config=("text_config",),
        beside=("model.visual.", "model.linear_proj."),
        note=f"{_NO_CLASS}; vLLM's CPU build loads it, and lacks its linear attention",
        status="converts",
    ),
    replace(_BAILING, model_type="sarvam_moe", example="Sarvam-30B", ahead=()),
    Family(
        "sarvam_mla",
        "Sarvam-105B",
        (*latent_attention(), *shared(), *dense()),
        note=_NO_CLASS,
        status="served",
    ),
)
