"""The family of a model by its config.json, and what is said of models that have none."""

from __future__ import annotations

import pytest

from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.families.find import find_family, text_settings
from vllm_milo.offline.families.table import FAMILIES

MOE = {"num_experts": 8}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_known_families(family):
    config: dict = {family.num_experts_keys[0]: 6}
    for key in reversed(family.text_config):
        config = {key: config}
    config["model_type"] = family.model_type
    assert find_family(config) is family
    assert family.num_experts(text_settings(config)) == 6


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "'llama' is not a Mixture-of-Experts model: it states no number of experts"),
        ({"model_type": "gemma4", "text_config": {"num_experts": None}}, "no num_experts; is this gemma4 model a MoE"),
        ({"model_type": "x", "text_config": {"num_experts": 1}}, "'x' is not a Mixture-of-Experts model"),
        (
            {"model_type": "minimax_m3", "num_local_experts": 32},
            "'minimax_m3' is a MoE family that MiLo does not know; the nearest that it knows is minimax_m2; ",
        ),
        ({"model_type": "qwen4_moe", **MOE}, "does not know; the nearest that it knows is qwen3_moe; `milo families`"),
        ({"model_type": "glm4v_moe", "text_config": MOE}, "'glm4v_moe' is a MoE family .* nearest .* is glm4_moe;"),
        (
            {"model_type": "llama5", "text_config": {"model_type": "llama5_text", "num_local_experts": 16}},
            "'llama5' around a text model 'llama5_text' is a MoE family that MiLo does not know",
        ),
        (
            {"model_type": "intern_vl", "text_config": {"model_type": "qwen3_moe", "num_experts": 256}},
            "'intern_vl' is a larger model around the text model 'qwen3_moe', which MiLo converts alone",
        ),
        (
            {"model_type": "qwen5_omni_moe", "thinker_config": {"text_config": {"model_type": "t", **MOE}}},
            "'qwen5_omni_moe' around a text model 't' is a MoE family .*; the nearest that it knows is qwen3_omni_moe",
        ),
        ({"model_type": "qwen3_5_moe", **MOE}, "has no text_config, the text model's; copy the file again"),
        ({"model_type": "qwen3_omni_moe", "thinker_config": MOE}, r"has no thinker_config\.text_config"),
        (
            {"model_type": "dbrx", "ffn_config": {"moe_num_experts": 16}},
            "'dbrx' is a MoE family that MiLo does",
        ),
        ({"model_type": "ernie4_5_vl_moe", "moe_num_experts": [64, 64]}, "MoE family .* nearest .* is ernie4_5_moe;"),
        ({"model_type": "mixtral"}, "no num_local_experts; is this mixtral model a MoE"),
        ({"model_type": ["a"], **MOE}, "is a MoE family that MiLo does not know"),
    ],
)
def test_others_are_told_apart(config: dict, message: str):
    with pytest.raises(ConversionError, match=message):
        find_family(config)


def test_settings_of_a_text_model_within_another():
    """What its own part leaves out, or has as null, the whole states."""
    parts = {"text_config": {"hidden_size": 64, "dtype": None, "model_type": "t", **MOE}, "hidden_size": 32}
    config = {"model_type": "qwen3_omni_moe", "thinker_config": parts, "dtype": "float16", "hidden_size": 8}
    settings = text_settings(config)
    assert (settings["hidden_size"], settings["num_experts"], settings["dtype"]) == (64, 8, "float16")
    assert settings["model_type"] == "qwen3_omni_moe"
    assert text_settings({"model_type": "mixtral", "hidden_size": 8}) == {"model_type": "mixtral", "hidden_size": 8}
