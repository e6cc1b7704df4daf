"""The serving benchmark: its model folders are valid for everyone who reads them, and it measures a tiny model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from benchmarks.serving import decode
from benchmarks.serving.models import CONTENDERS, MODELS, gptq, kv_bytes, milo, write_model
from benchmarks.serving.worker import stored_bytes
from vllm_milo.checkpoint import MiLoFormat


@pytest.mark.parametrize("name", MODELS)
def test_configs_are_read_back(name: str, tmp_path: Path):
    written = write_model(tmp_path, name, "milo-s1", layers=3)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == written["model_type"]
    assert config.num_hidden_layers == 3
    assert config.hidden_size == written["hidden_size"]
    assert config.quantization_config["quant_method"] == "milo"


@pytest.mark.parametrize(("name", "dense", "experts"), [("milo-s1", 512, 16), ("milo-s2", 1024, 32)])
def test_ranks_are_those_of_the_papers_strategies(name: str, dense: int, experts: int):
    quantization = CONTENDERS[name].quantization
    assert quantization is not None
    ranks = MiLoFormat.from_dict(quantization(MODELS["mixtral"])).ranks
    assert ranks.of_module("model.layers.0.self_attn.q_proj") == dense
    assert ranks.of_module("model.layers.7.self_attn.o_proj") == dense
    for projection in ("w1", "w2", "w3"):
        assert ranks.of_experts("model.layers.0.block_sparse_moe.experts", projection, 8) == [experts] * 8


def test_shared_experts_count_as_dense_and_routers_are_left_out():
    fmt = MiLoFormat.from_dict(milo(MODELS["deepseek"], 1 / 4, 16))
    assert fmt.ranks.of_module("model.layers.0.mlp.shared_expert.down_proj") == 512
    assert fmt.ignores("model.layers.0.mlp.gate")
    assert fmt.ignores("model.layers.0.mlp.shared_expert_gate")
    assert not fmt.ignores("model.layers.0.mlp.shared_expert.gate_proj")
    assert "shared_expert.up_proj" in gptq(MODELS["deepseek"])["modules_in_block_to_quantize"]


def test_kv_cache_bytes():
    # keys and values, 2 bytes, 8 layers, 8 heads of 128
    config = {"num_hidden_layers": 8, "num_key_value_heads": 8, "hidden_size": 4096, "num_attention_heads": 32}
    assert kv_bytes(config, 10) == 2 * 2 * 8 * 8 * 128 * 10
    assert kv_bytes(config | {"head_dim": 64}, 10) == 2 * 2 * 8 * 8 * 64 * 10


def test_bytes_are_counted_once_and_by_kind():
    model = torch.nn.Module()
    model.self_attn = torch.nn.Linear(4, 4, bias=False)
    model.experts = torch.nn.Linear(4, 8, bias=False)
    model.shared_expert = torch.nn.Linear(4, 2, bias=False)
    model.lm_head = torch.nn.Linear(4, 16, bias=False)
    model.embed = torch.nn.Module()
    model.embed.weight = model.lm_head.weight
    assert stored_bytes(model) == {"experts": 128, "attention": 64, "shared": 32, "rest": 256}


def test_a_failing_contender_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With something in place of vLLM that fails at once."""
    (tmp_path / "vllm.py").write_text("raise ImportError('no_such_module')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")

    output = tmp_path / "serve.json"
    decode.main(["-o", str(output), "--model", "tiny", "--contenders", "bf16"])
    row = json.loads(output.read_text())["rows"][0]
    assert "no_such_module" in row["error"]
    assert "Failed:" in output.with_suffix(".md").read_text()


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_tiny_model_is_measured(tmp_path: Path):
    output = tmp_path / "serve.json"
    words = ["-o", str(output), "--model", "tiny", "--layers", "1", "--batches", "1,2", "--prompts", "4", "--eager"]
    decode.main([*words, "--contenders", "milo-s1"])
    row = json.loads(output.read_text())["rows"][0]
    assert "error" not in row, row["error"]
    assert row["decode"]["1"]["milliseconds"] > 0
    assert row["throughput"]["output_tokens_per_second"] > 0
    assert any("milo::fused_moe" in line for line in row["kernels"])
    # 4 experts of three 64 x 128 matrices at 3.5 bits, factors of rank 16 in 3.25 bits, and the rank offsets
    weights, factors = 4 * 3 * 64 * 128, 4 * 3 * 16 * (64 + 128)
    assert row["weight_bytes"]["experts"] == pytest.approx((3.5 * weights + 3.25 * factors) / 8, rel=0.01)
    assert "| milo-s1 |" in output.with_suffix(".md").read_text()
