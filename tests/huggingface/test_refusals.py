"""What transformers is refused: broken checkpoints, what they do not fit, and what a packed model cannot do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from folder_edits import edit_config, edit_format, edit_tensors
from refusals import FAST
from safetensors.torch import load_file
from tiny_families import make_family
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers import AutoQuantizationConfig
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.trainer_utils import validate_quantization_for_training

from vllm_milo.checkpoint import CheckpointError, MiLoFormat
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.shards import ShardError

SHARD = "model-00001-of-00001.safetensors"
TOKENS = torch.tensor([[3, 4, 5]])


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of its own, to be broken."""
    return Path(shutil.copytree(checkpoint, tmp_path / "milo"))


@pytest.fixture(scope="module")
def model(checkpoint: Path):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def refused(folder: Path, message: str, error: type[Exception] = CheckpointError, **options) -> None:
    with pytest.raises(error, match=message):
        AutoModelForCausalLM.from_pretrained(folder, **options)


def test_a_newer_format(folder: Path):
    edit_format(folder, format_version=2)
    refused(folder, r"format_version is 2; this version of vllm-milo reads 1: upgrade vllm-milo")


def test_missing_tensors_are_named(folder: Path):
    edit_tensors(folder, SHARD, lambda tensors: tensors.pop("model.layers.1.mlp.experts.2.up_proj.weight_scale"))
    (folder / SHARD).rename(folder / "model.safetensors")  # as transformers calls a file without an index
    refused(folder, r"experts\.2\.up_proj\.weight_scale: missing")


def test_a_truncated_file(folder: Path):
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-8])
    refused(folder, "truncated", ShardError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_hidden_layers": 1, "layer_types": None},
            r"Qwen2MoeForCausalLM of transformers has no place for model\.layers\.1\.",
        ),
        ({"intermediate_size": 512}, r"layers\.0\.mlp\.gate_proj is \[256, 128\], but by config.json \[512, 128\]"),
        ({"moe_intermediate_size": 64}, r"experts\.0\.gate_proj is \[128, 128\], but by config.json \[64, 128\]"),
        ({"num_experts": 7}, r"layers\.1\.mlp\.experts holds 6 experts, but by config.json 7"),
        ({"hidden_act": "relu"}, r"layers\.1\.mlp\.experts: MiLo does not support the activation ReLU"),
    ],
)
def test_a_config_of_another_model(folder: Path, changes: dict, message: str):
    edit_config(folder, **changes)
    refused(folder, message)


@pytest.mark.parametrize("place", ["auto", {"model": 0, "lm_head": "cpu"}, {"": "disk"}])
def test_models_that_are_spread_or_offloaded(place):
    quantizer = AutoHfQuantizer.from_config(MiLoFormat().to_dict())
    with pytest.raises(
        CheckpointError, match=r"a MiLo model lies on one device, and is not offloaded; pass device_map="
    ):
        quantizer.validate_environment(device_map=place)
    for allowed in (None, {"": 0}, {"": torch.device("cpu")}):
        quantizer.validate_environment(device_map=allowed)


def test_other_settings_of_quantization(checkpoint: Path, sources: dict[str, Path]):
    refused(
        checkpoint,
        "quantized with MiLoHfConfig but you are passing a BitsAndBytesConfig",
        ValueError,
        quantization_config=BitsAndBytesConfig(),
    )
    mine = AutoQuantizationConfig.from_dict(MiLoFormat().to_dict())
    refused(sources["mixtral"], "cannot quantize a model to MiLo; `milo quantize MODEL", quantization_config=mine)


def test_weights_from_elsewhere(checkpoint: Path):
    kind = type(AutoModelForCausalLM.from_pretrained(checkpoint))
    config = kind.config_class.from_pretrained(checkpoint)
    with pytest.raises(CheckpointError, match="loaded from its folder; pass no state_dict"):
        kind.from_pretrained(None, config=config, state_dict=load_file(checkpoint / SHARD))


def test_saving(model, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with pytest.raises(ValueError, match="quantized with milo and is not serializable"):
        model.save_pretrained(tmp_path / "saved")
    assert "copy the folder that this model came from" in caplog.text
    assert not (tmp_path / "saved").exists()


def test_training(model):
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model(TOKENS)  # without no_grad: nothing asks for a gradient
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        validate_quantization_for_training(model)
    inputs = model.get_input_embeddings()(TOKENS).requires_grad_()
    with pytest.raises(RuntimeError, match="MiLo layers pass no gradients on, so a MiLo model cannot be trained"):
        model(inputs_embeds=inputs)
    with torch.no_grad():
        model(inputs_embeds=inputs)


def test_experts_with_biases(tmp_path: Path):
    out = convert(make_family("gpt_oss", tmp_path / "source"), tmp_path / "out", Conversion(FAST), progress=False).out
    refused(out, r"mlp\.experts: MiLo does not run experts of GptOssExperts in transformers, .*; serve .* with vLLM")
