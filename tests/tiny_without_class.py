"""Tiny models of families that transformers has no class for: made of another family's, or by the shapes of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tiny_configs import DEEP_VISION, EXPERTS, GROUPED, HEADS, LATENT, QUERIES, ROUTED, Tiny

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
    """Multi-head latent attention, with a latent of the queries or without, inside its block."""
    hidden, heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = (config[f"{part}_head_dim"] for part in ("qk_nope", "qk_rope", "v"))
    queries, reads = heads * (nope + rope), config.get("q_lora_rank")
    found: Shapes = {"q_proj.weight": (queries, hidden)}
    if reads:
        found = {
            "q_a_proj.weight": (reads, hidden),
            "q_a_layernorm.weight": (reads,),
            "q_b_proj.weight": (queries, reads),
        }
    return found | {
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


def _decoder(
    config: Mapping[str, Any],
    attention: Callable[[int], Shapes],
    block: str = "self_attn",
    bias: str = "e_score_correction_bias",
    embed: str = "embed_tokens",
) -> Shapes:
    """A model of layers with ``attention``, by their index, and an FFN or experts with one that is shared."""
    hidden, experts = config["hidden_size"], config["num_experts"]
    found = _around(config, embed)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        found |= {f"{layer}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        found |= {f"{layer}.{block}.{name}": shape for name, shape in attention(index).items()}
        if index < config["first_k_dense_replace"]:
            found |= _ffn(f"{layer}.mlp", hidden, config["intermediate_size"])
            continue
        found |= {f"{layer}.mlp.gate.weight": (experts, hidden), f"{layer}.mlp.gate.{bias}": (experts,)}
        for name in ("shared_experts", *(f"experts.{expert}" for expert in range(experts))):
            found |= _ffn(f"{layer}.mlp.{name}", hidden, config["moe_intermediate_size"])
    return found


def ling(whole: Mapping[str, Any]) -> Shapes:
    """Return the shapes of Ling-2.5's tensors, or of Ling-3's where convolutions are stated; published by Ant."""
    config = whole.get("text_config", whole)
    hidden, is_third = config["hidden_size"], "short_conv_kernel_size" in config

    def attention(index: int) -> Shapes:
        if (index + 1) % config["layer_group_size"]:
            return _delta(config) if is_third else _lightning(config)
        gate: Shapes = {"g_proj.weight": (config["num_attention_heads"], hidden)}
        return _latent(config, "dense") | (gate if is_third else {})

    found = _decoder(config, attention, "attention", "expert_bias", "word_embeddings")
    if "vision_config" in whole:
        found |= {"model.visual.patch_embed.proj.weight": (64, 3, 2, 4, 4), "model.linear_proj.0.weight": (hidden, 64)}
    return found


def sarvam(config: Mapping[str, Any]) -> Shapes:
    """Return the shapes of the tensors of Sarvam-105B."""
    return _decoder(config, lambda _: _latent(config, "o_proj"))


def pangu(config: Mapping[str, Any]) -> Shapes:
    """Return the shapes of the tensors of openPangu-Ultra-MoE, whose FFN has a norm before it and one after it."""
    found = _decoder(config, lambda _: _latent(config, "o_proj"), bias="bias")
    for index in range(config["num_hidden_layers"]):
        layer, norm = f"model.layers.{index}", (config["hidden_size"],)
        found |= {f"{layer}.{part}_mlp_layernorm.weight": norm for part in ("pre", "post")}
        bias = found.pop(f"{layer}.mlp.gate.bias", None)
        found |= {} if bias is None else {f"{layer}.mlp.e_score_correction_bias": bias}
    return found


def _grouped(config: Mapping[str, Any]) -> Shapes:
    """Attention of Step-3.5, inside its block."""
    hidden, heads, size = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    keys: Shapes = {f"{part}_proj.weight": (config["num_attention_groups"] * size, hidden) for part in "kv"}
    norms: Shapes = {f"{part}_norm.weight": (size,) for part in "qk"}
    rest: Shapes = {"q_proj.weight": (heads * size, hidden), "g_proj.weight": (heads, hidden)}
    return keys | norms | rest | {"o_proj.weight": (hidden, heads * size)}


def _shared_query(config: Mapping[str, Any]) -> Shapes:
    """Attention of Step-3, inside its block: of one head of keys and values, and queries of all heads from a latent."""
    hidden, heads, size = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    latent = config["share_q_dim"]
    found: Shapes = {f"{part}_proj.weight": (latent if part == "q" else size, hidden) for part in "qkv"}
    rest: Shapes = {"inter_norm.weight": (latent,), "wq.weight": (heads * size, latent)}
    return found | rest | {"o_proj.weight": (hidden, heads * size)}


def step(config: Mapping[str, Any]) -> Shapes:
    """Return the shapes of the tensors of Step-3, or of Step-3.5 as a part of Step-3.7; published by StepFun."""
    text = config.get("text_config", config)
    hidden, inner, experts = text["hidden_size"], text["moe_intermediate_size"], text["moe_num_experts"]
    sparse = list(map(int, text["moe_layers_enum"].split(",")))
    found = _around(text)
    for index in range(text["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        found |= {f"{layer}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        attention = _shared_query(text) if "share_q_dim" in text else _grouped(text)
        found |= {f"{layer}.self_attn.{name}": shape for name, shape in attention.items()}
        if index not in sparse:
            found |= _ffn(f"{layer}.mlp", hidden, text["intermediate_size"])
            continue
        found |= _ffn(f"{layer}.share_expert", hidden, text["share_expert_dim"])
        found |= {f"{layer}.moe.{name}_proj.weight": (experts, inner, hidden) for name in ("gate", "up")}
        found |= {
            f"{layer}.moe.down_proj.weight": (experts, hidden, inner),
            f"{layer}.moe.gate.weight": (experts, hidden),
        }
        if text.get("use_moe_router_bias"):
            found |= {f"{layer}.moe.router_bias": (experts,)}
    if "vision_config" in config:
        found |= {"vision_model.conv1.weight": (64, 3, 4, 4), "vit_large_projector.weight": (hidden, 64)}
    return found


def _compressor(hidden: int, width: int) -> Shapes:
    """What makes a key of several tokens', of DeepSeek-V4: of those before too, so twice as wide."""
    found: Shapes = {f"{name}.weight": (2 * width, hidden) for name in ("wkv", "wgate")}
    return found | {"ape": (4, 2 * width), "norm.weight": (width,)}


def deepseek_v4(config: Mapping[str, Any]) -> Shapes:
    """Return the shapes of DeepSeek-V4's tensors, in a copy in 16 bits."""
    hidden, heads, size, streams = (
        config[key] for key in ("hidden_size", "num_attention_heads", "head_dim", "hc_mult")
    )
    reads, groups, puts = config["q_lora_rank"], config["o_groups"], config["o_lora_rank"]
    table, mixes = (config["vocab_size"], hidden), (2 + streams) * streams
    found: Shapes = {"embed.weight": table, "head.weight": table, "norm.weight": (hidden,)}
    found |= {"hc_head_fn": (streams, streams * hidden), "hc_head_base": (streams,), "hc_head_scale": (1,)}
    for index, ratio in enumerate(config["compress_ratios"]):
        attention: Shapes = {
            "attn_sink": (heads,),
            "wq_a.weight": (reads, hidden),
            "q_norm.weight": (reads,),
            "wq_b.weight": (heads * size, reads),
            "wkv.weight": (size, hidden),
            "kv_norm.weight": (size,),
            "wo_a.weight": (groups * puts, heads * size // groups),
            "wo_b.weight": (hidden, groups * puts),
        }
        if ratio:
            attention |= {f"compressor.{name}": shape for name, shape in _compressor(hidden, size).items()}
            width = config["index_head_dim"]
            attention |= {f"indexer.compressor.{name}": shape for name, shape in _compressor(hidden, width).items()}
            attention |= {"indexer.wq_b.weight": (config["index_n_heads"] * width, reads)}
            attention |= {"indexer.weights_proj.weight": (config["index_n_heads"], hidden)}
        layer: Shapes = {f"attn.{name}": shape for name, shape in attention.items()}
        layer |= {f"{name}_norm.weight": (hidden,) for name in ("attn", "ffn")}
        for name in ("attn", "ffn"):
            layer |= {f"hc_{name}_fn": (mixes, streams * hidden), f"hc_{name}_base": (mixes,), f"hc_{name}_scale": (3,)}
        is_hashed = index < config["num_hash_layers"]
        layer |= {"ffn.gate.weight": (config["n_routed_experts"], hidden)}
        layer |= (
            {"ffn.gate.tid2eid": (config["vocab_size"], config["num_experts_per_tok"])}
            if is_hashed
            else {"ffn.gate.bias": (config["n_routed_experts"],)}
        )
        for name in ("shared_experts", *(f"experts.{expert}" for expert in range(config["n_routed_experts"]))):
            inner = config["moe_intermediate_size"]
            layer |= {f"ffn.{name}.{part}.weight": (inner, hidden) for part in ("w1", "w3")}
            layer |= {f"ffn.{name}.w2.weight": (hidden, inner)}
        found |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
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
LING = (
    BAILING.config
    | LATENT
    | QUERIES
    | {"num_hidden_layers": 3, "layer_group_size": 3, "group_norm_size": 2, "linear_silu": False}
    | {"num_attention_heads": 2, "num_key_value_heads": 2}  # whose states fit a block of keys on CPUs
    | {"rms_norm_eps": 1e-6, "hidden_act": "silu", "routed_scaling_factor": 2.5}
    | {"moe_shared_expert_intermediate_size": 192}
)
STEP_3 = {"num_attention_heads": 4, "head_dim": 64, "num_attention_groups": 1, "share_q_dim": 128} | {
    "intermediate_size": 256,
    "moe_intermediate_size": 192,
    "share_expert_dim": 192,
    "moe_num_experts": 4,
    "moe_top_k": 2,
    "moe_layers_enum": "1",
    "norm_expert_weight": True,
    "max_position_embedding": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "hidden_act": "silu",
}
STEP_3_5 = (
    HEADS
    | EXPERTS
    | {
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "sliding_window": 64,
        "moe_layers_enum": "1,2",
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "share_expert_dim": 192,
        "num_attention_groups": 2,
        "use_head_wise_attn_gate": True,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": 2.0,
        "use_moe_router_bias": True,
        "need_fp32_gate": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "swiglu_limits": [0.0, 0.0, 7.0],
        "swiglu_limits_shared": [0.0, 0.0, 2.0],
    }
)
LING_3 = {"short_conv_kernel_size": 4, "no_kda_lora": True, "gated_attention_proj_granularity_type": "head_wise"}
"""What makes Ling-3 of the tiny Ling-2.5."""

WITHOUT_CLASS = {
    "sarvam_moe": BAILING._replace(architecture="SarvamMoEForCausalLM"),
    "bailing_moe": BAILING,
    "bailing_moe_v2": BAILING._replace(architecture="BailingMoeV2ForCausalLM"),
    "bailing_hybrid": Tiny(
        LING,
        shapes=ling,
        architecture="BailingMoeV2_5ForCausalLM",
    ),
    "bailing_moe_v3_vl": Tiny(
        LING | LING_3 | {"architectures": ["BailingMoeV3ForCausalLM"], "model_type": "bailing_hybrid"},
        shapes=ling,
        architecture="BailingMoeV3VLForConditionalGeneration",
        around={"vision_config": DEEP_VISION},
    ),
    "deepseek_v4": Tiny(
        {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 512, "qk_rope_head_dim": 64}
        | {"q_lora_rank": 128, "o_groups": 2, "o_lora_rank": 64, "sliding_window": 64, "hc_mult": 4}
        | {"hc_sinkhorn_iters": 2, "hc_eps": 1e-6, "num_hidden_layers": 3, "compress_ratios": [0, 4, 4]}
        | {"num_hash_layers": 1, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 192, "index_topk": 64, "index_n_heads": 4, "index_head_dim": 128}
        | {"topk_method": "noaux_tc", "scoring_func": "sqrtsoftplus", "norm_topk_prob": True, "swiglu_limit": 10.0}
        | {"routed_scaling_factor": 1.5, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4}
        | {"compress_rope_theta": 4e4, "expert_dtype": "fp8"},
        shapes=deepseek_v4,
        architecture="DeepseekV4ForCausalLM",
    ),
    "sarvam_mla": Tiny(
        LATENT
        | ROUTED
        | GROUPED
        | {"num_experts": 4, "num_shared_experts": 1, "moe_router_enable_expert_bias": True}
        | {"score_function": "sigmoid", "hidden_act": "silu", "rms_norm_eps": 1e-6}
        | {"head_dim": 576, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        shapes=sarvam,
        architecture="SarvamMLAForCausalLM",
    ),
    "pangu_ultra_moe": Tiny(
        LATENT
        | QUERIES
        | ROUTED
        | {"num_experts": 4, "sandwich_norm": True, "router_enable_expert_bias": True, "hidden_act": "silu"}
        | {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-5}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        shapes=pangu,
        architecture="PanguUltraMoEForCausalLM",
    ),
    "step3p5": Tiny(
        STEP_3_5,
        shapes=step,
        architecture="Step3p5ForCausalLM",
        louder=r"moe\.(gate|up)_proj",  # its activation is clamped at 7
    ),
    "step3p7": Tiny(
        STEP_3_5 | {"architectures": ["Step3p5ForCausalLM"], "model_type": "step3p5"},
        shapes=step,
        architecture="Step3p7ForConditionalGeneration",
        around={"vision_config": {"width": 64, "layers": 1, "heads": 2, "image_size": 16, "patch_size": 4}},
        louder=r"moe\.(gate|up)_proj",
    ),
    "step3_text": Tiny(STEP_3, shapes=step, architecture="Step3TextForCausalLM"),
    "step3_vl": Tiny(
        STEP_3 | {"architectures": ["Step3TextForCausalLM"], "model_type": "step3_text"},
        shapes=step,
        architecture="Step3VLForConditionalGeneration",
        around={"vision_config": {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}},
    ),
}
