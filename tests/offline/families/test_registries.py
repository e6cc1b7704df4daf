"""Every MoE family that vLLM or transformers knows is in the table, or among those that are refused with a reason.

Where a new release of either brings one, these tests name it: give it an entry, or say in ``refused.py`` why not.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassError
from tiny_families import TINY
from transformers.models.auto import modeling_auto

from vllm_milo.offline.families.find import configs_within, counts_experts
from vllm_milo.offline.families.refused import REFUSED
from vllm_milo.offline.families.table import FAMILIES

LANGUAGE_MODELS = ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES")
PARTS = ("_text", "_thinker", "_talker_text")
"""Ends of the names of what is a part of a larger model."""
NOT_MOE = {"PanguEmbeddedForCausalLM"}
"""Dense models whose module in vLLM has others with experts."""
OTHER_SPELLINGS = {"ExaoneMoEForCausalLM", "Qwen3OmniMoeForConditionalGeneration", "MiMoV2FlashForCausalLM"}
"""Architectures of families in the table that transformers and the tiny models call otherwise."""
SECOND = {"BailingMoeV3ForCausalLM", "Glm5NextForCausalLM"}
"""Further architectures of families in the table."""


def classes(model_type: str) -> set[str]:
    """The names of transformers' classes of a family."""
    tables = (getattr(modeling_auto, table, {}) for table in LANGUAGE_MODELS)
    found = (table.get(model_type, ()) for table in tables)
    return {name for names in found for name in ([names] if isinstance(names, str) else names)}


def in_vllm() -> Iterator[str]:
    """The architectures of vLLM that have experts, by the sources of their modules."""
    registry = pytest.importorskip("vllm.model_executor.models.registry")
    for table in (registry._TEXT_GENERATION_MODELS, registry._MULTIMODAL_MODELS):
        for architecture, (module, _) in table.items():
            place = module if "." in module else f"vllm.model_executor.models.{module}"
            spec = importlib.util.find_spec(place)
            assert spec is not None, place
            assert spec.origin is not None, place
            file = Path(spec.origin)
            files = file.parent.rglob("*.py") if file.name == "__init__.py" else [file]
            has_experts = any("FusedMoE" in one.read_text() for one in files)
            if re.search("moe", architecture, re.IGNORECASE) or (has_experts and module != "transformers"):
                yield architecture


def test_vllm():
    known = OTHER_SPELLINGS | SECOND | NOT_MOE | {name for one in REFUSED.values() for name in one.architectures}
    for model_type in FAMILIES:
        known |= classes(model_type) | {TINY[model_type].architecture or ""}
    found = set(in_vllm())
    assert {"MixtralForCausalLM", "DeepseekV4ForCausalLM", "Qwen2MoeForCausalLM"} <= found
    unknown = sorted(found - known)
    assert not unknown, f"vLLM serves MoE families that are in neither table: {', '.join(unknown)}"


def test_transformers():
    found = []
    for model_type in transformers.CONFIG_MAPPING:
        if not classes(model_type):
            continue
        try:
            config = transformers.CONFIG_MAPPING[model_type]().to_dict()
        except (ValueError, OSError, ImportError, StrictDataclassError):
            continue  # has no sizes of its own: it is made of other models
        if any(map(counts_experts, configs_within(config))):
            found.append(model_type)
    assert {"mixtral", "deepseek_v4", "qwen3_5_moe"} <= set(found)
    known = {*FAMILIES, *REFUSED}
    wholes = (next((name.removesuffix(end) for end in PARTS if name.endswith(end)), name) for name in found)
    unknown = sorted({name for name, whole in zip(found, wholes, strict=True) if not {name, whole} & known})
    assert not unknown, f"transformers has MoE families that are in neither table: {', '.join(unknown)}"


def test_no_family_is_in_both_tables():
    assert not FAMILIES.keys() & REFUSED.keys()
    architectures = {name for one in REFUSED.values() for name in one.architectures}
    assert not architectures & {name for model_type in FAMILIES for name in classes(model_type)}
    assert not architectures & {tiny.architecture for tiny in TINY.values()}
