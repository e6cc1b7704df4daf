"""Tiny random models of every family in the converter's table, in the layout that their makers publish.

To add a family, add an entry to :data:`TINY`; CONTRIBUTING.md shows how.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import hand_made
import torch
import transformers
from safetensors.torch import load_file, save_file
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
    HIDDEN,
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
from tiny_models import COMMON, FAMILIES, fill, randomize
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
        | {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_hidden_layers": 3}
        | {"mlp_layer_types": ["dense", "sparse", "sparse"], "linear_head_dim": 64, "linear_num_heads": 2},
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


def has_class(name: str) -> bool:
    """Whether transformers can run a family."""
    return not TABLE[name].not_run and _is_known(name)


def learns(name: str) -> bool:
    """Whether a family is converted along a text."""
    return has_class(name) and not TABLE[name].not_learned


def _is_known(name: str) -> bool:
    """Whether transformers has a configuration of a family."""
    return (TABLE[name].runs_as or name) in transformers.CONFIG_MAPPING


def _config(name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a family's config, with the text model's and its changes at its place."""
    whole = part = deepcopy(dict(TINY[name].around))
    for key in TABLE[name].text_config:
        part = part.setdefault(key, {})
    part |= COMMON | TINY[name].config | changes
    return whole


def _order(key: str) -> tuple[int, str]:
    """Return by what the tensors of a model are sorted so that queries, keys and values follow each other."""
    found = re.search(r"self_attn\.([qkv])_proj", key)
    return ("qkv".index(found[1]) if found else 0, key)


def publish(name: str, folder: Path) -> None:
    """Bring what transformers saved into the layout that the family's makers publish."""
    weights, published = folder / "model.safetensors", {}
    for key, tensor in sorted(load_file(weights).items(), key=lambda item: _order(item[0])):
        fused = TABLE[name].fused_experts(key)
        other = fused is not None and fused.transposed and not fused.lies_transposed(tensor.shape, HIDDEN)
        for pattern, replacement in TINY[name].published:
            key = re.sub(pattern, replacement, key)
        if tensor.dim() == 2 and TABLE[name].fused_experts(key):
            tensor = tensor[None]
        if key in published:  # under one name with others
            tensor = torch.cat([published[key], tensor])
        if not any(part in key for part in TINY[name].without):
            published[key] = tensor.mT.contiguous() if other else tensor
    save_file(published, weights, metadata={"format": "pt"})


def fuse_as_published(name: str, source: Path, folder: Path) -> Path:
    """Bring experts that are stored one by one into the 3-D tensors [E, N, K] of their source, if it has such."""
    tensors = load_file(folder / "model.safetensors")
    for key, tensor in load_file(source / "model.safetensors").items():
        fused = TABLE[name].fused_experts(key)
        if fused is not None and tensor.dim() == 3 and not fused.transposed:
            tensors[key] = torch.stack(
                [
                    fused.joined([tensors.pop(f"{fused.experts}.{expert}.{leaf}.weight") for leaf in fused.projections])
                    for expert in range(len(tensor))
                ]
            )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_family(
    name: str,
    folder: Path,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    louder: str | None = None,
    **changes: Any,
) -> Path:
    """Save a tiny random model of a family, with all that its makers' checkpoints have.

    ``changes`` are of the text model's configuration, ``louder`` is instead of the family's own pattern; weights are
    made on ``device``, large ones on a GPU in seconds.
    """
    tiny = TINY[name]
    louder = louder or tiny.louder
    torch.manual_seed(seed)
    if tiny.shapes is None:
        written = _save(name, folder, dtype, device, louder, changes)
    else:
        written = _save_by_shapes(name, folder, dtype, device, louder, changes)
    written = {key: value for key, value in written.items() if key not in tiny.unsaid}
    written |= {"model_type": name, "architectures": [tiny.architecture or written["architectures"][0]]}
    (folder / "config.json").write_text(json.dumps(written, indent=2))
    return folder if _is_known(name) else hand_made.bring_configuration(folder, name)


def _save(
    name: str, folder: Path, dtype: torch.dtype, device: str, louder: str | None, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Save a model that transformers makes; return what its config.json states."""
    tiny = TINY[name]
    config = transformers.AutoConfig.for_model(tiny.made_of or name, **_config(name, changes))
    found = transformers.AutoModelForMultimodalLM if tiny.around else transformers.AutoModelForCausalLM
    with torch.device(device):
        model = found.from_config(config)
    fill(model)
    for key, parameter in model.named_parameters():
        if louder and re.search(louder, key):
            parameter.data.mul_(8)
    model.to(dtype).save_pretrained(folder)
    publish(name, folder)
    return json.loads((folder / "config.json").read_text())


def _save_by_shapes(
    name: str, folder: Path, dtype: torch.dtype, device: str, louder: str | None, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Save a model that transformers does not make; return what its config.json states."""
    config, shapes = _config(name, changes), TINY[name].shapes
    assert shapes is not None
    tensors = {}
    for key, shape in shapes(config).items():
        if key.endswith("tid2eid"):  # of a token's experts
            tensors[key] = torch.rand(shape[0], config["n_routed_experts"]).topk(shape[1]).indices
            continue
        tensor = torch.empty(shape, device=device)
        randomize(key, tensor)
        if key == TABLE[name].embedding:
            tensor.normal_()
        elif key.startswith(TABLE[name].head):
            tensor.normal_(std=0.25)
        tensors[key] = (tensor * 8 if louder and re.search(louder, key) else tensor).to(dtype).cpu()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return config | {"dtype": str(dtype).removeprefix("torch.")}
