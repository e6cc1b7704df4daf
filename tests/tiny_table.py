"""The configurations of tiny models, one for each family in the converter's table.

To add a family, add an entry to :data:`TINY`; CONTRIBUTING.md shows how.
"""

from __future__ import annotations

from tiny_configs import (
    ARIA_VISION,
    AUDIO,
    CODES,
    DEEP_VISION,
    EXPERTS,
    GEMMA,
    GEMMA_VISION,
    GLM_VISION,
    GRANITE,
    GROUPED,
    HEADS,
    KIMI_VISION,
    LATENT,
    LINEAR,
    LLAMA,
    LLAMA_VISION,
    NO_AHEAD,
    PLAIN,
    QUERIES,
    ROUTED,
    TALKER,
    VISION,
    WAVES,
    Tiny,
)
from tiny_models import FAMILIES
from tiny_without_class import WITHOUT_CLASS

from vllm_milo.offline.families.table import FAMILIES as TABLE

TINY = {
    **{name: Tiny(config) for name, config in FAMILIES.items()},
    **WITHOUT_CLASS,
    "minimax_m2": Tiny(
        HEADS
        | PLAIN
        | {"rotary_dim": 32, "use_qk_norm": True, "num_mtp_modules": 0}
        | {"scoring_func": "sigmoid", "use_routing_bias": True}
    ),
    "phimoe": Tiny(
        HEADS | PLAIN | {"head_dim": 32, "attention_bias": True, "lm_head_bias": True},
        architecture="PhiMoEForCausalLM",
    ),
    "qwen3_next": Tiny(HEADS | EXPERTS | LINEAR, dtype="bfloat16"),
    "qwen3_5_moe_text": Tiny(HEADS | EXPERTS | LINEAR, dtype="bfloat16"),
    "flex_olmo": Tiny(
        HEADS
        | {"num_key_value_heads": 4, "head_dim": 32, "intermediate_size": 192, "num_experts": 4}
        | {"num_experts_per_tok": 2}
    ),
    "mellum": Tiny(HEADS | EXPERTS | {"num_experts": 4}),
    "deepseek": Tiny(
        HEADS | ROUTED | {"intermediate_size": 704, "head_dim": 32, "moe_layer_freq": 1, "scoring_func": "softmax"},
        made_of="dots1",
        without=("q_norm", "k_norm", "e_score_correction_bias"),
        architecture="DeepseekForCausalLM",
    ),
    "deepseek_v2": Tiny(
        LATENT | ROUTED | {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1}
    ),
    "deepseek_v3": Tiny(
        LATENT | ROUTED | GROUPED | QUERIES | NO_AHEAD | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    ),
    "kimi_k2": Tiny(
        LATENT
        | ROUTED
        | QUERIES
        | NO_AHEAD
        | {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "n_group": 1, "topk_group": 1},
        made_of="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
    ),
    "kimi_k25": Tiny(
        LATENT
        | ROUTED
        | QUERIES
        | NO_AHEAD
        | {"model_type": "deepseek_v3", "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
        | {"n_group": 1, "topk_group": 1},
        around={"tie_word_embeddings": False, "projection_hidden_size": 64, "vision_config": KIMI_VISION},
        # transformers 5.19 undoes its renames of the tower in names of the text model too
        published=(
            (r"language_model\.model\.blocks", "language_model.model.layers"),
            (r"^model\.mm_projector", "mm_projector"),
            (r"encoder\.patch_embed", "patch_embed"),
        ),
    ),
    # vLLM wants a norm after the dense FFN too, which transformers' class does not have, and never uses it
    **{
        name: Tiny(
            LATENT
            | ROUTED
            | GROUPED
            | QUERIES
            | NO_AHEAD
            | {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "index_topk": 64, "index_n_heads": 4}
            | {"index_head_dim": 128}
        )
        for name in ("deepseek_v32", "glm_moe_dsa")
    },
    "hy_v4": Tiny(
        LATENT
        | ROUTED
        | QUERIES
        | {"num_hidden_layers": 3, "index_topk": 64, "index_n_heads": 4, "index_head_dim": 128}
        | {"indexer_types": ["full", "full", "shared"], "mlp_layer_types": ["dense", "sparse", "sparse"]},
        # transformers 5.19 undoes its renames in too many names
        published=(
            (r"^model\.hc_pre\.hc_head", "model.hc_head"),
            (r"hc_pre\.hc_(attn|mlp)_layer", r"hc_\1_layer.hc_pre"),
            (r"(mlp|shared_experts|experts\.\d+)\.linear_gate", r"\1.gate_proj"),
        ),
    ),
    "glm5_next": Tiny(
        LATENT
        | ROUTED
        | QUERIES
        | {"num_hidden_layers": 4, "qk_rope_head_dim": 0, "qk_nope_head_dim": 64, "index_topk": 64, "index_n_heads": 4}
        | {"index_head_dim": 128, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}
        | {"layer_types": ["linear_attention", "indexed_attention", "linear_attention", "indexed_attention"]}
        | {"indexer_types": ["full"] * 4, "linear_head_dim": 64, "linear_num_heads": 4}
        | {"mhc": True, "mla_use_nope": True, "indexer_rope_interleave": True, "topk_method": "noaux_tc"}
        | {"scoring_func": "sigmoid"},  # which vLLM reads, and transformers takes for granted
        around={"vision_config": GLM_VISION},
    ),
    "axk1": Tiny(LATENT | ROUTED | GROUPED | QUERIES | {"first_k_dense_replace": 0}),
    "glm4_moe_lite": Tiny(LATENT | ROUTED | QUERIES | NO_AHEAD),
    "glm4_moe": Tiny(HEADS | ROUTED | NO_AHEAD | {"attention_bias": True, "use_qk_norm": True}),
    "dots1": Tiny(HEADS | ROUTED),
    "solar_open": Tiny(HEADS | ROUTED | {"first_k_dense_replace": 0}),
    "mimo_v2_flash": Tiny(
        HEADS
        | EXPERTS
        | {"num_hidden_layers": 3, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
        | {"n_routed_experts": 4, "v_head_dim": 64, "sliding_window": 64}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            }
        }
        # as its makers write it, and vLLM reads it
        | {"hybrid_layer_pattern": [0, 1, 0], "moe_layer_freq": [0, 1, 1], "layernorm_epsilon": 1e-5}
        | {"rope_theta": 5e6, "swa_rope_theta": 1e4, "partial_rotary_factor": 0.5, "sliding_window_size": 64}
        | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 64, "swa_v_head_dim": 64}
        | {"add_swa_attention_sink_bias": True}
    ),
    "ernie4_5_moe": Tiny(
        HEADS | EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 2, "moe_layer_start_index": 1}
    ),
    "hy_v3": Tiny(
        HEADS
        | EXPERTS
        | NO_AHEAD
        | {"num_experts": 4, "num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"], "qk_norm": True}
        | {
            "first_k_dense_replace": 1,
            "expert_hidden_dim": 192,
            "moe_router_enable_expert_bias": True,
            "moe_router_use_sigmoid": True,
        }
        | {"route_norm": True, "enable_moe_fp32_combine": False, "enable_lm_head_fp32": False}
    ),
    "hunyuan_v1_moe": Tiny(HEADS | {"intermediate_size": 192, "num_experts": 4, "moe_topk": 2}),
    "exaone_moe": Tiny(
        HEADS
        | EXPERTS
        | {"num_experts": 4, "num_shared_experts": 1, "sliding_window": 64}
        | {"layer_types": ["sliding_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"]}
    ),
    "afmoe": Tiny(
        HEADS
        | EXPERTS
        | {"num_experts": 4, "num_shared_experts": 1, "num_dense_layers": 1, "sliding_window": 64}
        | {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1}
    ),
    "granitemoe": Tiny(GRANITE),
    "granitemoeshared": Tiny(GRANITE | {"shared_intermediate_size": 256}),
    "granitemoehybrid": Tiny(
        GRANITE
        | {"shared_intermediate_size": 256, "layer_types": ["mamba", "attention"], "position_embedding_type": "rope"}
        | {"mamba_n_heads": 4, "mamba_d_state": 64, "mamba_d_head": 64, "mamba_chunk_size": 64}
    ),
    "lfm2_moe": Tiny(
        EXPERTS
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_dense_layers": 1}
        | {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "tie_word_embeddings": True}
    ),
    "qwen3_5_moe": Tiny(HEADS | EXPERTS | LINEAR, dtype="bfloat16", around={"vision_config": VISION}),
    "qwen3_vl_moe": Tiny(
        HEADS | EXPERTS | {"num_experts": 4, "norm_topk_prob": True}, around={"vision_config": DEEP_VISION}
    ),
    "qwen3_omni_moe": Tiny(
        HEADS | EXPERTS | {"num_experts": 4, "norm_topk_prob": True},
        around={
            "thinker_config": {
                "vision_config": DEEP_VISION | {"image_size": 16, "apply_vit_abs_pos_embed": True},
                "audio_config": AUDIO,
            },
            "talker_config": {"text_config": TALKER, "code_predictor_config": CODES}
            | {"thinker_hidden_size": 128, "spatial_merge_size": 2},
            "code2wav_config": WAVES,
        },
    ),
    "gemma4_text": Tiny(GEMMA),
    "gemma4": Tiny(GEMMA, around={"vision_config": GEMMA_VISION, "audio_config": None}),
    "kimi_linear": Tiny(
        LATENT
        | EXPERTS
        | {"num_experts": 4, "num_shared_experts": 1, "num_experts_per_token": 2}
        # as its makers write it, and vLLM reads it
        | {"num_hidden_layers": 3, "first_k_dense_replace": 1, "mla_use_nope": True}
        | {
            "linear_attn_config": {
                "kda_layers": [1, 3],
                "full_attn_layers": [2],
                "head_dim": 64,
                "num_heads": 2,
                "short_conv_kernel_size": 4,
            }
        },
        published=((r"block_sparse_moe\.(\w+_proj)", r"mlp.\1"),),
    ),
    "longcat_flash": Tiny(
        LATENT
        | QUERIES
        | {"num_hidden_layers": 4, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "ffn_hidden_size": 256}
        | {
            "expert_ffn_hidden_size": 192,
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
            "zero_expert_type": "identity",
            "hidden_size": 256,  # vLLM's kernel for experts without weights computes whole blocks of 256 alone
        },
        without=(".experts.4.", ".experts.5."),  # which have no weights
    ),
    "glm4v_moe": Tiny(
        HEADS
        | ROUTED
        | NO_AHEAD
        | {"attention_bias": True, "pad_token_id": 2}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}},
        around={"vision_config": VISION | {"image_size": 16}},
    ),
    "laguna": Tiny(
        HEADS
        | EXPERTS
        | {"num_experts": 4, "shared_expert_intermediate_size": 192, "gating": True, "sliding_window": 64}
    ),
    "cohere2_moe": Tiny(
        HEADS
        | {"intermediate_size": 192, "prefix_dense_intermediate_size": 256, "num_experts": 4, "num_experts_per_tok": 2}
        | {"sliding_window": 64, "tie_word_embeddings": True, "num_shared_experts": 1, "logit_scale": 0.5}
    ),
    "llama4_text": Tiny(LLAMA),
    "llama4": Tiny(LLAMA, around={"vision_config": LLAMA_VISION}),
    "aria": Tiny(
        HEADS
        | {"model_type": "aria_text", "intermediate_size": 256, "moe_num_experts": 4, "moe_topk": 2}
        | {"moe_num_shared_experts": 2},
        around={"projector_patch_to_query_dict": {"4": 2}, "vision_config": ARIA_VISION},
    ),
    "gpt_oss": Tiny(
        HEADS | PLAIN | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64},
        louder=r"experts\.gate_up_proj$",  # its activation is clamped at 7
    ),
    "nemotron_h": Tiny(
        HEADS
        | ROUTED
        | GROUPED
        | {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"], "moe_latent_size": 64}
        | {"moe_shared_expert_intermediate_size": 256, "mamba_num_heads": 4, "mamba_head_dim": 64, "n_groups": 2}
        | {"ssm_state_size": 64, "chunk_size": 64, "routed_scaling_factor": 2.5},
        unquantized=False,  # its own experts have a gate on CPUs
    ),
    "jamba": Tiny(
        {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 192, "num_experts": 4}
        | {"num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
    ),
}
assert TINY.keys() == TABLE.keys(), f"the table and the tiny models differ in {TINY.keys() ^ TABLE.keys()}"
