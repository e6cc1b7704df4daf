"""The table of model families that MiLo converts. To add a family, add an entry; CONTRIBUTING.md shows how.

Names of projections that no family had before go to :mod:`vllm_milo.names` too, which says what role they have.
"""

from __future__ import annotations

from dataclasses import replace

from ..nouns import Kind
from .bailing import BAILING
from .deepseek import DEEPSEEK_LIKE
from .family import LATER_LAYERS, Family
from .nvidia import NVIDIA
from .qwen import QWEN
from .slots import FUSED, MIXTRAL, Cut, FusedTensor, Rename, Slot, Stack, attention, dense, latent_attention, shared
from .stepfun import STEPFUN

_SERVED = "served"
_ROUTED = ("n_routed_experts",)
_LOCAL = ("num_local_experts",)
_MIXTRAL_NAMES = (Rename("mlp.", "block_sparse_moe."),)
_NO_ROUTER = "vLLM's CPU build refuses its router's scores"
_NO_BIAS = "vLLM's CPU build drops its router's bias"
_KEEPS_MAMBA = "Mamba layers stay as they are"
_GRANITE_FUSED = (
    FusedTensor("input_linear.weight", ("gate", "up")),
    FusedTensor("output_linear.weight", ("down",)),
)
_GRANITE_NAMES = (
    Rename("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.input_linear.weight"),
    Rename("block_sparse_moe.experts.down_proj", "block_sparse_moe.output_linear.weight"),
    Rename("block_sparse_moe.router.weight", "block_sparse_moe.router.layer.weight"),
)
_GRANITE_SHARED = (Slot("shared_mlp.output_linear", Kind.SHARED_EXPERT, Cut.INPUTS),)

_MIXTRAL_LIKE = (
    Family(
        "mixtral",
        "Mixtral-8x7B, 8x22B",
        attention(),
        kept=("block_sparse_moe.gate",),
        block="block_sparse_moe",
        projections=MIXTRAL,
        num_experts_keys=_LOCAL,
        renames=_MIXTRAL_NAMES,
        status=_SERVED,
    ),
    Family(
        "minimax_m2",
        "MiniMax-M2, M2.1",
        attention(),
        kept=("block_sparse_moe.gate",),
        block="block_sparse_moe",
        projections=MIXTRAL,
        num_experts_keys=_LOCAL,
        ahead=(LATER_LAYERS,),
        renames=_MIXTRAL_NAMES,
        note=_NO_ROUTER,
        status=_SERVED,
    ),
    Family(
        "phimoe",
        "Phi-3.5-MoE",
        attention(),
        kept=("block_sparse_moe.gate",),
        block="block_sparse_moe",
        projections=MIXTRAL,
        num_experts_keys=_LOCAL,
        renames=(Rename("mlp.router.", "block_sparse_moe.gate."), *_MIXTRAL_NAMES),
        status=_SERVED,
    ),
)

_OTHERS = (
    Family(
        "mimo_v2_flash",
        "MiMo-V2-Flash",
        (*attention(), *dense()),
        num_experts_keys=_ROUTED,
        ahead=("model.mtp.",),
        layer_kinds_keys=("hybrid_layer_pattern", "layer_types"),
        renames=(Rename("self_attn.sinks", "self_attn.attention_sink_bias"),),
        status=_SERVED,
    ),
    Family(
        "ernie4_5_moe",
        "ERNIE-4.5-21B-A3B-PT, 300B-A47B-PT",
        (*attention(), *shared(), *dense()),
        num_experts_keys=("moe_num_experts",),
        ahead=("model.mtp_",),
        renames=(Rename("mlp.gate.moe_statics.", "mlp.moe_statics."),),
        note=_NO_BIAS,
        status=_SERVED,
    ),
    Family(
        "hy_v3",
        "Hy3",
        (*attention(), *shared("mlp.shared_mlp"), *dense()),
        kept=("mlp.router.gate",),
        ahead=(LATER_LAYERS,),
        renames=(
            Rename("mlp.gate.", "mlp.router.gate."),
            Rename("mlp.e_score_correction_bias", "mlp.expert_bias"),
            Rename("mlp.shared_experts.", "mlp.shared_mlp."),
        ),
        status=_SERVED,
    ),
    Family(
        "hunyuan_v1_moe",
        "Hunyuan-A13B",
        (*attention(), *shared("mlp.shared_mlp"), *dense()),
        kept=("mlp.gate.wg",),
        status=_SERVED,
    ),
    Family(
        "exaone_moe",
        "K-EXAONE-236B-A23B",
        (*attention(), *shared(), *dense()),
        ahead=("mtp.",),
        renames=(Rename("mlp.gate.e_score_correction_bias", "mlp.e_score_correction_bias"),),
        status=_SERVED,
    ),
    Family(
        "afmoe",
        "Trinity-Nano, Mini, Large",
        (*attention(), Slot("self_attn.gate_proj", Kind.ATTENTION), *shared(), *dense()),
        kept=("mlp.router.gate",),
        status=_SERVED,
    ),
    Family(
        "granitemoe",
        "Granite-3.0-1B-A400M, 3B-A800M",
        attention(),
        kept=("block_sparse_moe.router.layer",),
        block="block_sparse_moe",
        fused=_GRANITE_FUSED,
        only_fused=True,
        num_experts_keys=_LOCAL,
        renames=_GRANITE_NAMES,
        logits_divisor_key="logits_scaling",
        status=_SERVED,
    ),
    Family(
        "granitemoeshared",
        "Granite-MoE with shared experts",
        (*attention(), *_GRANITE_SHARED),
        kept=("block_sparse_moe.router.layer", "shared_mlp.input_linear"),
        block="block_sparse_moe",
        fused=_GRANITE_FUSED,
        only_fused=True,
        num_experts_keys=_LOCAL,
        renames=_GRANITE_NAMES,
        logits_divisor_key="logits_scaling",
        status=_SERVED,
    ),
    Family(
        "granitemoehybrid",
        "Granite-4.0-H-Tiny, H-Small",
        (*attention(), *_GRANITE_SHARED),
        kept=("block_sparse_moe.router.layer", "shared_mlp.input_linear", "mamba.in_proj", "mamba.out_proj"),
        block="block_sparse_moe",
        fused=_GRANITE_FUSED,
        only_fused=True,
        num_experts_keys=_LOCAL,
        mixers=("self_attn", "mamba"),
        renames=_GRANITE_NAMES,
        logits_divisor_key="logits_scaling",
        note=_KEEPS_MAMBA,
        status=_SERVED,
    ),
    Family(
        "laguna",
        "Laguna-XS, M",
        (*attention(), *shared("mlp.shared_expert"), *dense()),
        kept=("mlp.gate", "self_attn.g_proj"),
        renames=(
            Rename("mlp.gate.e_score_correction_bias", "mlp.experts.e_score_correction_bias"),
            Rename("mlp.shared_experts.", "mlp.shared_expert."),
        ),
        note="vLLM 0.32 passes over its router's bias, so that MiLo's check of what was loaded refuses it",
    ),
    Family(
        "cohere2_moe",
        "Command with experts",
        (*attention(), *shared(), *dense()),
        logits_factor_key="logit_scale",
        status=_SERVED,
    ),
    Family(
        "lfm2_moe",
        "LFM2-8B-A1B",
        (*attention(out="out_proj"), *dense("feed_forward", MIXTRAL)),
        kept=("feed_forward.gate", "conv.in_proj", "conv.out_proj"),
        block="feed_forward",
        projections=MIXTRAL,
        mixers=("self_attn", "conv"),
        norm="embedding_norm",
        note="convolutions stay as they are",
        status=_SERVED,
    ),
    Family(
        "jamba",
        "Jamba-1.5-Mini, 1.5-Large",
        (*attention(), *dense("feed_forward")),
        kept=("feed_forward.router", *(f"mamba.{part}_proj" for part in ("in", "x", "dt", "out"))),
        block="feed_forward",
        mixers=("self_attn", "mamba"),
        norm="final_layernorm",
        status=_SERVED,
        note=f"{_KEEPS_MAMBA}, and vLLM's CPU build cannot run them",
    ),
)

_KIMI_KEPT = ("q", "k", "v", "b", "f_a", "f_b", "g_a", "g_b")
_MOONSHOT_LIKE = (
    Family(
        "kimi_linear",
        "Kimi-Linear-48B-A3B",
        (
            Slot("self_attn.kv_a_proj_with_mqa", Kind.ATTENTION, Cut.WHOLE),
            Slot("self_attn.kv_b_proj", Kind.ATTENTION),
            Slot("self_attn.o_proj", Kind.ATTENTION, Cut.INPUTS),
            *shared("block_sparse_moe.shared_experts"),
            *dense(),
        ),
        # vLLM fuses all that reads the input of linear attention; latent attention has a q_proj of the same name
        kept=("block_sparse_moe.gate", *(f"self_attn.{part}_proj" for part in _KIMI_KEPT)),
        block="block_sparse_moe",
        projections=MIXTRAL,
        mixers=("self_attn.kv_a_proj_with_mqa", "self_attn.q_conv1d"),
        renames=(
            Rename("self_attn.forget_gate.", "self_attn."),
            *(Rename(f"mlp.{part}", f"block_sparse_moe.{part}") for part in ("experts", "shared_experts.", "gate.")),
        ),
        stacks=(Stack("self_attn.conv1d.weight", tuple(f"self_attn.{part}_conv1d.weight" for part in "qkv")),),
        status=_SERVED,
        note="what linear attention reads stays as it is, and vLLM's CPU build lacks its operators",
    ),
    Family(
        "longcat_flash",
        "LongCat-Flash-Chat",
        (*(slot for part in "01" for slot in (*latent_attention(f"self_attn.{part}"), *dense(f"mlps.{part}"))),),
        kept=("mlp.router.classifier",),
        num_experts_keys=_ROUTED,
        no_experts_key="zero_expert_num",
        num_layers_key="num_layers",
        ahead=("model.mtp.", "mtp."),
        not_run="its class wants weights of the experts that have none",
        status=_SERVED,
        note="no calibration text; vLLM's CPU build lacks its router's operator",
    ),
)
_LLAMA = Family(
    "llama4_text",
    "text models of Llama-4",
    (
        Slot("self_attn.o_proj", Kind.ATTENTION, Cut.INPUTS),
        *shared("feed_forward.shared_expert"),
        *dense("feed_forward"),
    ),
    # vLLM reorders rows of queries and keys when it loads them, and fuses values with these
    kept=("feed_forward.router", *(f"self_attn.{part}_proj" for part in "qkv")),
    block="feed_forward",
    fused=tuple(tensor._replace(transposed=True) for tensor in FUSED),
    only_fused=True,
    num_experts_keys=_LOCAL,
    not_run="its class multiplies the inputs of all experts at once",
    note="no calibration text; queries, keys and values stay as they are",
    status=_SERVED,
)
_LLAMA_LIKE = (
    _LLAMA,
    replace(
        _LLAMA,
        model_type="llama4",
        example="Llama-4-Scout, Maverick",
        body="language_model.model",
        head="language_model.lm_head",
        text_config=("text_config",),
        beside=("vision_model.", "multi_modal_projector."),
    ),
)
_GEMMA = Family(
    "gemma4_text",
    "text models of Gemma-4-26B-A4B",
    (*attention(), *dense()),
    kept=("router.proj",),
    block="",
    only_fused=True,
    layer_kinds_keys=("layer_types",),
    logits_cap_key="final_logit_softcapping",
    status=_SERVED,
)
_GEMMA_LIKE = (
    _GEMMA,
    replace(
        _GEMMA,
        model_type="gemma4",
        example="Gemma-4-26B-A4B",
        body="model.language_model",
        text_config=("text_config",),
        beside=("model.vision_tower.", "model.embed_vision.", "model.audio_tower.", "model.embed_audio."),
    ),
)

_ARIA = Family(
    "aria",
    "Aria",
    (*attention(), *shared()),
    kept=("mlp.router",),
    fused=(
        FusedTensor("experts.fc1.weight", ("gate", "up"), transposed=True, in_memory=True),
        FusedTensor("experts.fc2.weight", ("down",), transposed=True, in_memory=True),
    ),
    only_fused=True,
    num_experts_keys=("moe_num_experts",),
    body="language_model.model",
    body_in_memory="model.language_model",
    head="language_model.lm_head",
    head_in_memory="lm_head",
    text_config=("text_config",),
    beside=("vision_tower.", "multi_modal_projector."),
    renames=(
        Rename("mlp.experts.gate_up_proj", "mlp.experts.fc1.weight"),
        Rename("mlp.experts.down_proj", "mlp.experts.fc2.weight"),
    ),
    not_learned="its experts lie transposed in transformers' memory, of which the calibration knows nothing",
    note="no calibration text",
    status=_SERVED,
)
_OPENAI = Family(
    "gpt_oss",
    "gpt-oss-20b, 120b",
    attention(),
    kept=("mlp.router",),
    fused=(
        FusedTensor("experts.gate_up_proj", ("gate", "up"), transposed=True, in_memory=True, interleaved=True),
        FusedTensor("experts.down_proj", ("down",), transposed=True, in_memory=True),
    ),
    only_fused=True,
    num_experts_keys=_LOCAL,
    layer_kinds_keys=("layer_types",),
    not_learned="its experts have biases, of which the calibration knows nothing",
    note="no calibration text; biases of experts stay as they are",
    status=_SERVED,
)
_ALL = (
    *_MIXTRAL_LIKE,
    *QWEN,
    *DEEPSEEK_LIKE,
    *_OTHERS,
    *_GEMMA_LIKE,
    *BAILING,
    *_MOONSHOT_LIKE,
    *_LLAMA_LIKE,
    _ARIA,
    _OPENAI,
    *NVIDIA,
    *STEPFUN,
)
FAMILIES = {family.model_type: family for family in _ALL}
"""The families by ``model_type``."""
