"""NVIDIA's entries of the table of families: each layer is one of Mamba, attention, FFN and experts without a gate."""

from __future__ import annotations

from ..nouns import Kind
from .family import Family
from .slots import FUSED_UNGATED, UNGATED, Cut, Slot, attention, dense, shared

NVIDIA = (
    Family(
        "nemotron_h",
        "Nemotron-3-Nano-30B-A3B, Super-120B-A12B",
        (
            *attention("mixer"),
            *shared("mixer.shared_experts", UNGATED),
            Slot("mixer.fc1_latent_proj", Kind.DENSE_FFN, Cut.WHOLE),
            Slot("mixer.fc2_latent_proj", Kind.DENSE_FFN, Cut.WHOLE),
            *dense("mixer", UNGATED),
        ),
        kept=("mixer.gate", "mixer.in_proj", "mixer.out_proj"),
        block="mixer",
        projections=UNGATED,
        fused=FUSED_UNGATED,
        num_experts_keys=("n_routed_experts",),
        experts_width_keys=("moe_latent_size", "hidden_size"),
        ahead=("mtp.",),
        mixers=("mixer.in_proj", "mixer.q_proj", "mixer.gate", "mixer.up_proj"),
        body="backbone",
        body_in_memory="model",
        embed="embeddings",
        norm="norm_f",
        note="Mamba layers stay as they are; vLLM's CPU build refuses experts without a gate",
        status="served",
    ),
)
