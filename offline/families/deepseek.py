"""DeepSeek's entries of the table of families, and those of families built like them."""

from __future__ import annotations

from dataclasses import replace

from ..nouns import Kind
from .family import LATER_LAYERS, Family
from .refused import HYPER_CONNECTIONS
from .slots import MIXTRAL, Cut, Rename, Slot, Stack, attention, dense, latent_attention, shared

_SERVED = "served"
_ROUTED = ("n_routed_experts",)
_INDEXER = tuple(f"self_attn.indexer.{part}" for part in ("wq_b", "wk", "weights_proj"))
_SPARSE = "what chooses tokens for sparse attention stays as it is, and vLLM's CPU build has no sparse attention"
_GLM = Family(
    "glm4_moe",
    "GLM-4.5, 4.6, 4.7, 4.5-Air",
    (*attention(), *shared(), *dense()),
    num_experts_keys=_ROUTED,
    ahead=(LATER_LAYERS,),
    status=_SERVED,
)

_V3 = Family(
    "deepseek_v3",
    "DeepSeek-V3, R1",
    (*latent_attention(), *shared(), *dense()),
    num_experts_keys=_ROUTED,
    ahead=(LATER_LAYERS,),
    status=_SERVED,
)
_KIMI = replace(_V3, model_type="kimi_k2", example="Kimi-K2", runs_as="deepseek_v3")

_COMPRESSORS = tuple(f"attn.{place}compressor.{part}" for place in ("", "indexer.") for part in ("wkv", "wgate"))
_V4 = Family(
    "deepseek_v4",
    "DeepSeek-V4-Flash, V4-Pro",
    (
        Slot("attn.wq_a", Kind.ATTENTION, Cut.WHOLE),
        Slot("attn.wkv", Kind.ATTENTION, Cut.WHOLE),
        Slot("attn.wq_b", Kind.ATTENTION),
        Slot("attn.wo_b", Kind.ATTENTION, Cut.INPUTS),
        *shared("ffn.shared_experts", MIXTRAL),
    ),
    # vLLM multiplies by the plain weights of wo_a and of compressors
    kept=("ffn.gate", "attn.wo_a", *_COMPRESSORS, "attn.indexer.wq_b", "attn.indexer.weights_proj"),
    block="ffn",
    projections=MIXTRAL,
    num_experts_keys=_ROUTED,
    ahead=("mtp.",),
    body="",
    head="head",
    embed="embed",
    mixers=("ffn.gate.tid2eid", "ffn.gate.bias"),  # of which the former chooses experts by a hash of the token
    layer_kinds_keys=("compress_ratios",),
    states=(("expert_dtype", "milo"),),  # vLLM takes none for fp4, and renames scales of linear layers then
    not_run=HYPER_CONNECTIONS,
    note="no calibration text; hyper-connections stay as they are; vLLM's CPU build loads it, and lacks an operator",
)

_HY_STREAMS = tuple(
    Rename(f"{memory}_hc.{part}", f"hc_{published}_layer.hc_pre.hc_{part}")
    for memory, published in (("attn", "attn"), ("ffn", "mlp"))
    for part in ("fn", "base", "scale")
)
_HY4 = Family(
    "hy_v4",
    "Hy4",
    (*latent_attention(), Slot("self_attn.linear_gate", Kind.ATTENTION), *shared(), *dense()),
    kept=("mlp.gate", *_INDEXER),
    num_experts_keys=_ROUTED,
    ahead=(LATER_LAYERS, "model.mtp_layers."),
    layer_kinds_keys=("indexer_types",),
    renames=(
        Rename("self_attn.sinks", "self_attn.learnable_sink_param"),
        Rename("self_attn.gate_proj.", "self_attn.linear_gate."),
        *_HY_STREAMS,
    ),
    not_run=HYPER_CONNECTIONS,
    note=f"no calibration text; hyper-connections stay as they are; {_SPARSE}",
)

_LINEAR_ATTENTION = ("q", "k", "v", "b", "f_a", "f_b", "g_a", "g_b")
_LATENT_ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
_GLM_NEXT = Family(
    "glm5_next",
    "GLM-5.3-Flash",
    (*shared(), *dense()),
    # vLLM's class takes latent attention in 16 bits only, and fuses all that reads the input of linear attention
    kept=(
        "mlp.gate",
        *(f"self_attn.{part}_proj" for part in _LINEAR_ATTENTION),
        *(f"self_attn.{part}" for part in _LATENT_ATTENTION),
        *_INDEXER,
    ),
    num_experts_keys=_ROUTED,
    ahead=(LATER_LAYERS,),
    body="model.language_model",
    text_config=("text_config",),
    beside=("model.visual.",),
    mixers=("self_attn.q_a_proj", "self_attn.q_conv1d"),
    layer_kinds_keys=("indexer_types",),
    renames=(
        Rename("self_attn.forget_gate.", "self_attn."),
        *(Rename(f"{part}_hc.", f"hc_{part}_") for part in ("attn", "ffn")),
    ),
    stacks=(Stack("self_attn.conv1d.weight", tuple(f"self_attn.{part}_conv1d.weight" for part in "qkv")),),
    not_run=HYPER_CONNECTIONS,
    note=f"no calibration text; attention and hyper-connections stay as they are; {_SPARSE}",
)

DEEPSEEK_LIKE = (
    _V4,
    _HY4,
    _GLM_NEXT,
    Family(
        "deepseek",
        "DeepSeek-MoE-16B",
        (*attention(), *shared(), *dense()),
        num_experts_keys=_ROUTED,
        note="no calibration text: transformers has no class for it",
        status=_SERVED,
    ),
    Family(
        "deepseek_v2",
        "DeepSeek-V2, V2-Lite",
        (*latent_attention(), *shared(), *dense()),
        num_experts_keys=_ROUTED,
        status=_SERVED,
    ),
    _V3,
    _KIMI,
    replace(
        _KIMI,
        model_type="kimi_k25",
        example="Kimi-K2.5, K2.6",
        ahead=(),
        body="language_model.model",
        body_in_memory="model.language_model",
        head="language_model.lm_head",
        head_in_memory="lm_head",
        text_config=("text_config",),
        beside=("vision_tower.", "mm_projector."),
        runs_as=None,
        note="vLLM wants its makers' image processor even for text alone",
        status="converts",
    ),
    replace(
        _V3,
        model_type="axk1",
        example="A.X-K1",
        renames=(Rename("mlp.post_mlp_layernorm.", "post_mlp_layernorm."),),
    ),
    replace(
        _V3,
        model_type="pangu_ultra_moe",
        example="openPangu-Ultra-MoE-718B",
        note="no calibration text: transformers has no class for it; names by vLLM's loader",
    ),
    Family(
        "glm4_moe_lite",
        "GLM-4.7-Flash",
        (*latent_attention(), *shared(), *dense()),
        num_experts_keys=_ROUTED,
        ahead=(LATER_LAYERS,),
        status=_SERVED,
    ),
    _GLM,
    replace(
        _GLM,
        model_type="glm4v_moe",
        example="GLM-4.5V, 4.6V",
        body="model.language_model",
        text_config=("text_config",),
        beside=("model.visual.",),
        status="converts",
    ),
    Family(
        "deepseek_v32",
        "DeepSeek-V3.2",
        (*latent_attention(), *shared(), *dense()),
        kept=("mlp.gate", *_INDEXER),
        num_experts_keys=_ROUTED,
        ahead=(LATER_LAYERS,),
        note=_SPARSE,
    ),
    Family(
        "glm_moe_dsa",
        "GLM-5",
        (*latent_attention(), *shared(), *dense()),
        kept=("mlp.gate", *_INDEXER),
        num_experts_keys=_ROUTED,
        ahead=(LATER_LAYERS,),
        not_run="its layers hand on which tokens they chose",
        note=f"no calibration text; {_SPARSE}",
    ),
    Family("dots1", "dots.llm1", (*attention(), *shared(), *dense()), num_experts_keys=_ROUTED, status=_SERVED),
    Family(
        "solar_open",
        "Solar-Open-100B",
        (*attention(), *shared(), *dense()),
        num_experts_keys=_ROUTED,
        ahead=(LATER_LAYERS,),
        status=_SERVED,
    ),
)
