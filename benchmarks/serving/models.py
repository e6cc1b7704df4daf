"""Shapes of known models, and how configs say that they are quantized."""

from __future__ import annotations

from typing import Any, NamedTuple

BASE = {
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Model(NamedTuple):
    """Shapes of a model.

    Attributes:
        config: of the Hugging Face config, without the number of layers.
        projections: names of an expert's gate, up and down projection.
        dense: substrings of the names of quantized linear layers, by GPTQ's rules.
    """

    config: dict[str, Any]
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    dense: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")


_SHARED = ("shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj")


def _qwen2_moe(hidden: int, experts: int, top_k: int, inner: int, shared: int, heads: int, vocab: int) -> Model:
    config = {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "hidden_size": hidden,
        "intermediate_size": shared,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": inner,
        "shared_expert_intermediate_size": shared,
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
        "vocab_size": vocab,
    }
    return Model(config, dense=Model({}).dense + _SHARED)


MODELS = {
    "mixtral": Model(
        {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": None,
            "vocab_size": 32000,
        },
        projections=("w1", "w3", "w2"),
    ),
    # DeepSeek-MoE-16B's shapes; its two shared experts are one of twice the width
    "deepseek": _qwen2_moe(2048, 64, 6, 1408, 2816, 16, 102400),
    "qwen3": Model(
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
            "mlp_only_layers": [],
            "vocab_size": 151936,
        }
    ),
    "tiny": _qwen2_moe(128, 4, 2, 64, 128, 2, 256),
}


def milo(model: Model, dense_fraction: float, expert_rank: int) -> dict[str, Any]:
    """Return MiLo's contract: dense ranks as a fraction of the hidden size, one rank for all experts; 3-bit factors."""
    dense = int(model.config["hidden_size"] * dense_fraction)
    return {
        "quant_method": "milo",
        "format_version": 1,
        "bits": 3,
        "group_size": 64,
        "zero_point": "real",
        "compensator": {"bits": 3, "group_size": 64},
        "ranks": {
            "default": 0,
            "modules": {rf"re:.*\.{name}": dense for name in model.dense},
            "experts": {r"re:.*\.experts": dict.fromkeys(model.projections, expert_rank)},
        },
        "ignore": ["lm_head", r"re:.*\.gate$", r"re:.*shared_expert_gate$"],
    }


def gptq(model: Model, group_size: int = 128) -> dict[str, Any]:
    """Return a symmetric 4-bit GPTQ config; without weight files vLLM must be told which linears are quantized."""
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group_size,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "modules_in_block_to_quantize": list(model.dense),
    }


def humming(model: Model) -> dict[str, Any]:
    """Return Humming's own format: uint3 with zero points, groups of 64."""
    return {
        "quant_method": "humming",
        "dtype": "uint3",
        "group_size": 64,
        "has_zero_point": True,
        "ignore": ["lm_head", r"re:.*\.gate$", r"re:.*shared_expert_gate$"],
    }


def kv_bytes(config: dict[str, Any], tokens: int) -> int:
    """Return the bf16 KV cache's bytes for ``tokens``."""
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head * tokens
