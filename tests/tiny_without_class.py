"""Tiny models of families that transformers has no class for: made of another family's, or by the shapes of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tiny_configs import GROUPED, HEADS, LATENT, QUERIES, ROUTED, Tiny

Shapes = dict[str, tuple[int, ...]]
"""Shapes of a model's tensors, by their names."""


def _around(config: Mapping[str, Any], embed: str = "embed_tokens") -> Shapes:
    """What is around the layers of a model."""
    table = (config["vocab_size"], config["hidden_size"])
    return {f"model.{embed}.weight": table, "lm_head.weight": table, "model.norm.weight": table[1:]}


def _ffn(name: str, hidden: int, inner: int) -> Shapes:
    """An FFN with a gate."""
    read = {f"{name}.{leaf}_proj.weight": (inner, hidden) for leaf in ("gate", "up")}
    return read | {f"{name}.down_proj.weight": (hidden, inner)}


def _latent(config: Mapping[str, Any], out: str) -> Shapes:
    """Multi-head latent attention with a latent of the queries, inside its block."""
    hidden, heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = (config[f"{part}_head_dim"] for part in ("qk_nope", "qk_rope", "v"))
    return {
        "q_a_proj.weight": (config["q_lora_rank"], hidden),
        "q_a_layernorm.weight": (config["q_lora_rank"],),
        "q_b_proj.weight": (heads * (nope + rope), config["q_lora_rank"]),
        "kv_a_proj_with_mqa.weight": (latent + rope, hidden),
        "kv_a_layernorm.weight": (latent,),
        "kv_b_proj.weight": (heads * (nope + value), latent),
        f"{out}.weight": (hidden, heads * value),
    }


def _lightning(config: Mapping[str, Any]) -> Shapes:
    """Linear attention of Ling-2.5, inside its block."""
    hidden, width = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    norms: Shapes = {f"{part}_layernorm.weight": (config["head_dim"],) for part in ("query", "key")}
    return norms | {
        "query_key_value.weight": (3 * width, hidden),
        "g_proj.weight": (width, hidden),
        "g_norm.weight": (width,),
        "dense.weight": (hidden, width),
    }


def _delta(config: Mapping[str, Any]) -> Shapes:
    """Linear attention of Ling-3, Kimi's delta attention, inside its block."""
    hidden, heads, size = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    found: Shapes = {f"{part}_proj.weight": (heads * size, hidden) for part in "qkvfg"}
    found |= {f"{part}_conv1d.weight": (heads * size, 1, config["short_conv_kernel_size"]) for part in "qkv"}
    return found | {
        "b_proj.weight": (heads, hidden),
        "A_log": (heads,),
        "dt_bias": (heads * size,),
        "o_norm.weight": (size,),
        "o_proj.weight": (hidden, heads * size),
    }


def ling(config: Mapping[str, Any]) -> Shapes:
    """Return the shapes of Ling-2.5's tensors, or of Ling-3's where convolutions are stated; published by Ant."""
    hidden, is_third = config["hidden_size"], "short_conv_kernel_size" in config
    found = _around(config, "word_embeddings")
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        found |= {f"{layer}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        attention = _delta(config) if is_third else _lightning(config)
        if (index + 1) % config["layer_group_size"] == 0:
            attention = _latent(config, "dense")
            if is_third:
                attention["g_proj.weight"] = (config["num_attention_heads"], hidden)
        found |= {f"{layer}.attention.{name}": shape for name, shape in attention.items()}
        if index < config["first_k_dense_replace"]:
            found |= _ffn(f"{layer}.mlp", hidden, config["intermediate_size"])
            continue
        found |= {f"{layer}.mlp.gate.weight": (config["num_experts"], hidden)}
        found |= {f"{layer}.mlp.gate.expert_bias": (config["num_experts"],)}
        for name in ("shared_experts", *(f"experts.{expert}" for expert in range(config["num_experts"]))):
            found |= _ffn(f"{layer}.mlp.{name}", hidden, config["moe_intermediate_size"])
    return found


BAILING = Tiny(
    HEADS
    | ROUTED
    | GROUPED
    | {"num_experts": 4, "num_shared_experts": 1, "use_qk_norm": True, "use_rmsnorm": True, "score_function": "sigmoid"}
    | {"moe_router_enable_expert_bias": True, "use_bias": False, "use_qkv_bias": False, "embedding_dropout": 0.0}
    | {"rope_theta": 10000.0, "norm_topk_prob": True, "scoring_func": "sigmoid"},
    made_of="dots1",
    architecture="BailingMoeForCausalLM",
    published=(
        (r"model\.embed_tokens", "model.word_embeddings"),
        (r"self_attn\.o_proj", "attention.dense"),
        (r"self_attn\.q_norm", "attention.query_layernorm"),
        (r"self_attn\.k_norm", "attention.key_layernorm"),
        (r"gate\.e_score_correction_bias", "gate.expert_bias"),
        (r"self_attn\.[qkv]_proj", "attention.query_key_value"),  # one tensor
    ),
)
LING_3 = {"short_conv_kernel_size": 4, "no_kda_lora": True, "gated_attention_proj_granularity_type": "head_wise"}
"""What makes Ling-3 of the tiny Ling-2.5."""

WITHOUT_CLASS = {
    "sarvam_moe": BAILING._replace(architecture="SarvamMoEForCausalLM"),
    "bailing_moe": BAILING,
    "bailing_moe_v2": BAILING._replace(architecture="BailingMoeV2ForCausalLM"),
    "bailing_hybrid": Tiny(
        BAILING.config
        | LATENT
        | QUERIES
        | {"num_hidden_layers": 3, "layer_group_size": 3, "group_norm_size": 2, "linear_silu": False}
        | {"num_attention_heads": 2, "num_key_value_heads": 2}  # whose states fit a block of keys on CPUs
        | {"rms_norm_eps": 1e-6, "hidden_act": "silu", "routed_scaling_factor": 2.5}
        | {"moe_shared_expert_intermediate_size": 192},
        shapes=ling,
        architecture="BailingMoeV2_5ForCausalLM",
    ),
}
