"""The MoE families that MiLo knows of and does not convert, each with the reason; what is in neither table is unknown.

tests/offline/families/test_registries.py holds both tables against those of vLLM and transformers.
"""

from __future__ import annotations

from typing import NamedTuple


class Refused(NamedTuple):
    """A family that is not converted.

    Attributes:
        model_type: ``model_type`` of config.json.
        example: models of the family, for people.
        why: what of it MiLo does not know or compute, as a clause.
        needed: what would have to be made first.
        architectures: ``architectures`` of config.json, by vLLM's registry, which tell whatever ``model_type`` says.
    """

    model_type: str
    example: str
    why: str
    needed: str
    architectures: tuple[str, ...] = ()


HYPER_CONNECTIONS = "its layers hand on several residual streams (hyper-connections)"
"""Why transformers does not run some of the families that are converted, and part of why others are not."""
_STREAMS_NEED = "slots for its attention and tables, and a GPU to compare a served model on"
_NOT_SERVED = "vLLM has no class that serves it"
_GONE = "vLLM no longer serves it"
_A_CLASS = "a class in vLLM"
_NOT_COMPARED = "its matrices have not been compared with what vLLM loads"
_AN_ENTRY = "an entry in the table, and a tiny model that is served as its dequantized self"
_NOT_TEXT = "it does not continue a text token by token"
_OTHER_KIND = "another way to compare a served model with its original"
_READS_PLAIN = "vLLM reads the plain weights of its projections, which quantized layers do not have"

_ALL = (
    Refused(
        "deepseek_v4_vl",
        "DeepSeek-V4 with images",
        "its files call it deepseek_v4, but its layers that choose experts by a hash of the token have biases of a "
        "router too, and " + _NOT_COMPARED,
        _AN_ENTRY,
        ("DeepseekV4ForConditionalGeneration",),
    ),
    Refused(
        "deepseek_v41",
        "DeepSeek-V4.1",
        f"{HYPER_CONNECTIONS}, as DeepSeek-V4's, and look n-grams up in tables (engrams), of whose matrices MiLo has "
        "no names",
        _STREAMS_NEED,
        ("DeepseekV41ForCausalLM",),
    ),
    Refused(
        "qwen4_exp",
        "Qwen4 (experimental)",
        f"{HYPER_CONNECTIONS} and look n-grams up in tables, of whose matrices MiLo has no names",
        _STREAMS_NEED,
        ("Qwen4ExpForCausalLM", "Qwen4ExpForConditionalGeneration"),
    ),
    Refused(
        "kimi_k3",
        "Kimi-K3",
        f"{_READS_PLAIN}, and its experts' activation (situ) is none that MiLo computes",
        "the activation in the kernels, and layers of vLLM that ask for no plain weights",
        ("KimiK3ForConditionalGeneration",),
    ),
    Refused(
        "minimax_m3_vl",
        "MiniMax-M3",
        "block-sparse attention has matrices that choose blocks, of which MiLo has no names",
        "slots for its attention, and a GPU to compare a served model on",
        ("MiniMaxM3SparseForCausalLM", "MiniMaxM3SparseForConditionalGeneration"),
    ),
    Refused(
        "param2moe",
        "Param2-17B-A2.4B",
        "vLLM calls its attention otherwise than its files do, in a way that the plugin cannot undo",
        "names of modules undone by names that end with a dot",
        ("Param2MoEForCausalLM",),
    ),
    Refused(
        "mimo_v2",
        "MiMo-V2.5",
        "its makers store queries, keys and values in one matrix that is cut for a number of GPUs already",
        "a reader that puts the parts of that matrix in order",
        ("MiMoV2ForCausalLM",),
    ),
    Refused(
        "nemotron_h_puzzle",
        "Nemotron-3 compressed by Puzzle",
        "its layers differ in number and size of experts",
        "numbers of experts and sizes by layer",
        ("NemotronHPuzzleForCausalLM",),
    ),
    Refused(
        "nemotron_h_omni",
        "Nemotron-3 with images and sound",
        "vLLM knows it by names of its own, and " + _NOT_COMPARED,
        _AN_ENTRY,
        ("NemotronH_Omni_Reasoning_V3", "NemotronH_Nano_Omni_Reasoning_V3", "NemotronH_Super_Omni_Reasoning_V3"),
    ),
    Refused(
        "k2_horizon",
        "K2-Horizon",
        "its attention has a router and experts of its own for values",
        "slots for such attention, and two blocks of experts a layer",
        ("K2HorizonForCausalLM",),
    ),
    Refused(
        "granitemoe_swa",
        "Granite-MoE with sliding windows",
        "transformers names its experts otherwise than other Granite models, and no published files were seen",
        _AN_ENTRY,
        ("GraniteMoeSWAForCausalLM",),
    ),
    Refused(
        "ernie4_5_vl_moe",
        "ERNIE-4.5-VL",
        "each layer has two blocks of experts, for text and for images",
        "two blocks of experts a layer",
        ("Ernie4_5_VLMoeForConditionalGeneration",),
    ),
    Refused("interns1_pro", "Intern-S1-Pro", _NOT_COMPARED, _AN_ENTRY, ("InternS1ProForConditionalGeneration",)),
    Refused(
        "interns2_mobius",
        "Intern-S2-Mobius",
        _NOT_COMPARED,
        _AN_ENTRY,
        ("InternS2MobiusForConditionalGeneration",),
    ),
    Refused(
        "dots3_note",
        "dots3-note",
        _READS_PLAIN,
        "layers of vLLM that ask for no plain weights",
        ("Dots3NoteForCausalLM",),
    ),
    Refused(
        "inkling_mm_model",
        "Inkling",
        _NOT_COMPARED,
        _AN_ENTRY,
        ("InklingForCausalLM", "InklingForConditionalGeneration"),
    ),
    Refused("inkling_text", "text models of Inkling", _NOT_COMPARED, _AN_ENTRY),
    Refused(
        "longcat_flash_ngram",
        "LongCat-Flash-Lite",
        "it embeds tokens together with those before them, and " + _NOT_COMPARED,
        _AN_ENTRY,
        ("LongcatFlashNgramForCausalLM",),
    ),
    Refused(
        "PanguProMoE",
        "Pangu-Pro-MoE",
        "its attention has keys and values that belong to no token, which vLLM computes on GPUs alone",
        "an entry in the table, and a GPU to compare a served model on",
        ("PanguProMoEV2ForCausalLM",),
    ),
    Refused(
        "moondream3",
        "Moondream3",
        "its experts compute gelu(gate)·(up + 1), which the kernels do not",
        "the activation in the kernels",
        ("Moondream3ForCausalLM", "HfMoondream"),
    ),
    Refused(
        "minicpm",
        "MiniCPM-MoE",
        "vLLM's class multiplies by plain weights of its experts, which it asks no quantization for",
        "experts of vLLM that ask for one",
        ("MiniCPMForCausalLM",),
    ),
    Refused(
        "ovis2_6_moe",
        "Ovis2.6-MoE",
        "it is a larger model whose parts MiLo has no names for",
        "an entry with the names of its parts, or its text model saved by itself",
        ("Ovis2_6_MoeForCausalLM",),
    ),
    Refused(
        "dbrx",
        "DBRX",
        "its makers store the experts of a layer in one matrix one after the other, and call layers blocks",
        "a reader that cuts that matrix, and names of layers by family",
        ("DbrxForCausalLM",),
    ),
    Refused(
        "mistral4",
        "Mistral-4, Mistral-Large-3",
        "vLLM reads it in Mistral's own format (consolidated.safetensors, params.json), whose names MiLo does not know",
        "a reader and a writer of that format",
    ),
    Refused("axk2", "A.X-K2", _NOT_SERVED, _A_CLASS),
    Refused("doge", "Doge", _NOT_SERVED, _A_CLASS),
    Refused("jetmoe", "JetMoE", _NOT_SERVED, _A_CLASS),
    Refused(
        "minimax",
        "MiniMax-Text-01, M1",
        _GONE,
        _A_CLASS,
        (
            "MiniMaxForCausalLM",
            "MiniMaxText01ForCausalLM",
            "MiniMaxM1ForCausalLM",
            "MiniMaxVL01ForConditionalGeneration",
        ),
    ),
    Refused("arctic", "Snowflake Arctic", _GONE, _A_CLASS, ("ArcticForCausalLM",)),
    Refused("grok-1", "Grok-1, Grok-2", _GONE, _A_CLASS, ("Grok1ModelForCausalLM", "Grok1ForCausalLM")),
    Refused("zaya", "ZAYA1", _NOT_SERVED, _A_CLASS),
    Refused(
        "deepseek_ocr2",
        "DeepSeek-OCR-2",
        "vLLM knows it by names of its own, and " + _NOT_COMPARED,
        _AN_ENTRY,
    ),
    Refused("diffusion_gemma", "DiffusionGemma", _NOT_TEXT, _OTHER_KIND),
    Refused("openai_privacy_filter", "OpenAI's privacy filter", _NOT_TEXT, _OTHER_KIND),
    Refused("nllb-moe", "NLLB-MoE", f"{_NOT_SERVED}: it has an encoder", _A_CLASS),
    Refused("switch_transformers", "Switch Transformers", f"{_NOT_SERVED}: it has an encoder", _A_CLASS),
)
REFUSED = {refused.model_type: refused for refused in _ALL}
"""The families that are not converted, by ``model_type``."""
