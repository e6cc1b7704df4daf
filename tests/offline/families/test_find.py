"""The family of a model by its config.json, and what is said of models that have none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_milo.offline.cli import main
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
        (
            {"model_type": "llama"},
            "'llama' is not a Mixture-of-Experts model: it states no number of experts; MiLo converts such models",
        ),
        ({"model_type": "gemma4", "text_config": {"num_experts": None}}, "no num_experts; is this gemma4 model a MoE"),
        ({"model_type": "x", "text_config": {"num_experts": 1}}, "'x' is not a Mixture-of-Experts model"),
        (
            {"model_type": "minimax_m3", "num_local_experts": 32},
            "'minimax_m3' is a MoE family that MiLo does not know; the nearest that it knows is minimax_m2; ",
        ),
        ({"model_type": "qwen4_moe", **MOE}, "does not know; the nearest that it knows is qwen3_moe; `milo families`"),
        ({"model_type": "glm5v_moe", "text_config": MOE}, "'glm5v_moe' is a MoE family .* nearest .* is glm4v_moe;"),
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
            r"'dbrx' \(DBRX\) is a MoE family that MiLo does not convert: its makers .*; that takes a reader",
        ),
        ({"model_type": "ernie4_5_vl_moe", "moe_num_experts": [64, 64]}, r"does not convert: .* two blocks of experts"),
        (
            {"model_type": "horizon_vl", "text_config": {"model_type": "k2_horizon", "moe_num_experts": 8}},
            "'horizon_vl' .* does not convert: .*experts of its own for values",
        ),
        (
            {"model_type": "longcat_flash", "architectures": ["LongcatFlashNgramForCausalLM"], "n_routed_experts": 4},
            r"'longcat_flash' \(LongCat-Flash-Lite\) is a MoE family that MiLo does not convert",
        ),
        ({"model_type": "minicpm", "num_experts": 0}, "'minicpm' is not a Mixture-of-Experts model"),
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


@pytest.mark.parametrize("options", [["--dry-run"], []])
def test_a_refused_family_is_refused_before_any_work(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """By config.json alone, in one line."""
    source = tmp_path / "source"
    source.mkdir()
    config = {"model_type": "deepseek_v41", "n_routed_experts": 256, "quantization_config": {"quant_method": "own"}}
    (source / "config.json").write_text(json.dumps(config))
    assert main(["quantize", str(source), "-o", str(tmp_path / "out"), *options]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "'deepseek_v41' (DeepSeek-V4.1) is a MoE family that MiLo does not convert: its layers" in said
    assert not (tmp_path / "out").exists()
