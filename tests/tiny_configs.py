"""What the configurations of several tiny families have in common: attention, experts, towers for images and sound."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from tiny_models import COMMON


class Tiny(NamedTuple):
    """How a tiny model of a family is made.

    Attributes:
        config: beside what all have in common.
        made_of: the ``model_type`` of transformers that makes its weights, where it has none for the family.
        shapes: what makes the shapes of its tensors from its config, where transformers makes nothing like them.
        without: parts of names of weights that the family does not have.
        architecture: in config.json, where it is not the name of transformers' class.
        dtype: that vLLM runs it in on CPUs; bfloat16 where its operators have no other.
        published: patterns of names that transformers saves otherwise than the makers publish, and what replaces them.
        around: the larger config that the text model's is part of.
        unquantized: whether vLLM's CPU build serves it unquantized too.
        unsaid: keys of config.json that its makers do not have, though the family does that makes its weights.
        louder: pattern of parameters that are eight times as large as in other models.
    """

    config: dict[str, Any]
    made_of: str | None = None
    shapes: Callable[[Mapping[str, Any]], dict[str, tuple[int, ...]]] | None = None
    without: tuple[str, ...] = ()
    architecture: str | None = None
    dtype: str = "float32"
    published: tuple[tuple[str, str], ...] = ()
    around: Mapping[str, Any] = MappingProxyType({})
    unquantized: bool = True
    unsaid: tuple[str, ...] = ()
    louder: str | None = None


HIDDEN = COMMON["hidden_size"]
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
LATENT = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,  # with the next, the only size that vLLM's latent attention takes on CPUs
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}
# groups of 128 divide the experts' inputs of no down projection, and the dense layer's of all but DeepSeek's
EXPERTS = {"intermediate_size": 256, "moe_intermediate_size": 192, "num_experts_per_tok": 2}
ROUTED = EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
GROUPED = {"n_group": 2, "topk_group": 1}
QUERIES = {"q_lora_rank": 128}
NO_AHEAD = {"num_nextn_predict_layers": 0}
PLAIN = {"intermediate_size": 192, "num_experts_per_tok": 2, "num_local_experts": 4}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "num_experts": 4,
    "num_experts_per_tok": 4,  # all: bfloat16 would choose others
    "shared_expert_intermediate_size": 192,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
GRANITE = PLAIN | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_multiplier": 0.1,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}

VISION = {
    "depth": 2,
    "hidden_size": 64,
    "num_heads": 2,
    "intermediate_size": 64,
    "out_hidden_size": 128,
    "patch_size": 4,
    "num_position_embeddings": 16,
}
GLM_VISION = {"depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 128}
GLM_VISION |= {"patch_size": 4, "image_size": 16, "projection_intermediate_size": 64}
ARIA_VISION = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
ARIA_VISION |= {"image_size": 16, "patch_size": 8}
KIMI_VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "patch_size": 4,
}
DEEP_VISION = VISION | {"deepstack_visual_indexes": [0]}
AUDIO = {
    "d_model": 64,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "num_mel_bins": 16,
    "output_dim": 128,
    "downsample_hidden_size": 32,
}

GEMMA = HEADS | {
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "global_head_dim": 128,
    "attention_k_eq_v": True,  # full attention has no values of its own
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 64,
    "intermediate_size": 256,
    "moe_intermediate_size": 192,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
}
LLAMA = HEADS | {
    "intermediate_size": 192,
    "intermediate_size_mlp": 256,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 256,
}
LLAMA_VISION = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 256}
LLAMA_VISION |= {"vision_output_dim": 64, "image_size": 16, "patch_size": 4, "projector_input_dim": 64}
LLAMA_VISION |= {"projector_output_dim": 64}
GEMMA_VISION = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
GEMMA_VISION |= {"num_key_value_heads": 2, "head_dim": 32, "patch_size": 4, "position_embedding_size": 64}
TALKER = COMMON | HEADS | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64}
TALKER |= {"num_hidden_layers": 1, "shared_expert_intermediate_size": 64}
CODES = COMMON | HEADS | {"num_hidden_layers": 1, "intermediate_size": 64, "num_code_groups": 2}
WAVES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64}
WAVES |= {"num_hidden_layers": 1, "codebook_size": 16, "num_quantizers": 2, "decoder_dim": 96}
