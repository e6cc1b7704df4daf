"""What users turn on in vLLM, on MiLo checkpoints: adapters, and loading the weights once more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import vllm_runner
from safetensors.torch import save_file
from tiny_models import FAMILIES, compare, make_prompts
from vllm_jobs import DEVICE, DTYPE, assert_matches, job

from vllm_milo.offline.evaluation.model import load_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
TARGETS = ["q_proj", "o_proj", "down_proj"]
RANK = 8


def save_adapter(checkpoint: Path, out: Path) -> torch.nn.Module:
    """Save a random adapter of attention and shared experts as PEFT does; return the dequantized model with it."""
    model, tensors = load_model(checkpoint, torch.float32, DEVICE), {}
    generator = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in TARGETS:
            a = torch.randn(RANK, module.in_features, generator=generator) / module.in_features**0.5
            b = torch.randn(module.out_features, RANK, generator=generator) * 0.1
            module.weight.data += (b @ a).to(module.weight)
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    assert {name.split(".")[5] for name in tensors} >= {"self_attn"}
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": TARGETS, "bias": "none"}
    (out / "adapter_config.json").write_text(json.dumps(config))
    return model


def test_an_adapter_of_what_is_no_expert(checkpoints: dict[str, Path], tmp_path: Path):
    """It changes the answers as it changes the dequantized model's; without its targets' names it is refused."""
    folder = checkpoints["qwen2_moe"]
    model = save_adapter(folder, tmp_path / "adapter")
    lora = {"enable_lora": True, "max_lora_rank": RANK, "quantization": "milo", "dtype": DTYPE}
    todo = job({"qwen2_moe": folder}, **lora, lora_target_modules=TARGETS) | {"lora": str(tmp_path / "adapter")}
    found = vllm_runner.run(todo, tmp_path)["qwen2_moe"]
    assert "error" not in found, found
    prompts = make_prompts(folder)
    differences = compare(model, prompts, found).differences
    plain = compare(load_model(folder, torch.float32, DEVICE), prompts, found).differences
    assert sum(differences) / len(differences) < (1e-4 if DTYPE == "float32" else 0.05)
    assert sum(plain) > 20 * sum(differences)
    refused = vllm_runner.run(job({"qwen2_moe": folder}, **lora), tmp_path)["qwen2_moe"]["error"]
    assert "MiLo does not support LoRA on experts" in refused


def test_layers_may_choose_experts_themselves(checkpoints: dict[str, Path], tmp_path: Path):
    """As vLLM's routers do, which take the largest of a softmax in these models; on CPUs by the reference."""
    names = (*FAMILIES, "bundled")
    todo = job({name: checkpoints[name] for name in names}, quantization="milo", dtype=DTYPE)
    found = vllm_runner.run(todo | {"chooses": True}, tmp_path)
    for name in names:
        assert_matches(name, checkpoints, found, DTYPE)


def test_weights_may_be_loaded_once_more(checkpoints: dict[str, Path], tmp_path: Path):
    names = ("qwen2_moe", "bundled")
    todo = job({name: checkpoints[name] for name in names}, quantization="milo", dtype=DTYPE) | {"reload": True}
    found = vllm_runner.run(todo, tmp_path)
    for name in names:
        assert_matches(name, checkpoints, found, DTYPE)
