"""The serving benchmark: its model folders are valid for everyone who reads them, and it measures a tiny model."""

from __future__ import annotations

import ctypes
import json
import os
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from benchmarks.serving import decode, traffic
from benchmarks.serving.contenders import CONTENDERS, write_model
from benchmarks.serving.models import MODELS, gptq, kv_bytes, milo
from benchmarks.serving.shipped import shipped_format
from benchmarks.serving.word_tokenizer import write_tokenizer
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
    ranks = MiLoFormat.from_dict(quantization("mixtral", 8)).ranks
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


def test_steps_that_read_prompts_are_of_whole_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        decode.main(["-o", str(tmp_path / "serve.json"), "--model", "tiny", "--prefill", "256,300"])
    assert "--prefill 300: prompts have 256 tokens" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_tiny_model_is_measured(tmp_path: Path):
    output = tmp_path / "serve.json"
    words = ["-o", str(output), "--model", "tiny", "--layers", "1", "--batches", "1,2", "--prompts", "4", "--eager"]
    decode.main([*words, "--contenders", "milo-s1", "--prefill", "512"])
    row = json.loads(output.read_text())["rows"][0]
    assert "error" not in row, row["error"]
    assert row["decode"]["1"]["milliseconds"] > 0
    assert row["throughput"]["output_tokens_per_second"] > 0
    read = row["prefill"]["512"]
    assert read["milliseconds"] > 0
    assert "512 tokens read (kernels)" in output.with_suffix(".md").read_text()
    assert any("milo::fused_moe" in one["name"] for one in read["operations"])
    assert any("milo::fused_moe" in line for line in row["kernels"])
    # 4 experts of three 64 x 128 matrices at 3.5 bits, factors of rank 16 in 3.25 bits, and the rank offsets
    weights, factors = 4 * 3 * 64 * 128, 4 * 3 * 16 * (64 + 128)
    assert row["weight_bytes"]["experts"] == pytest.approx((3.5 * weights + 3.25 * factors) / 8, rel=0.01)
    assert "| milo-s1 |" in output.with_suffix(".md").read_text()


@pytest.mark.parametrize("name", ["mixtral", "qwen3", "deepseek"])
def test_what_is_shipped_is_the_presets(name: str):
    fmt = MiLoFormat.from_dict(shipped_format(name, 2))
    assert fmt.group_size == 64
    assert fmt.ranks.of_module("model.layers.1.self_attn.o_proj") > 0
    assert fmt.ignores("model.layers.0.mlp.gate")
    small = MiLoFormat.from_dict(shipped_format(name, 2, "small"))
    assert small.group_size == 128
    fast = MiLoFormat.from_dict(shipped_format(name, 2, "fast")).ranks
    output = "model.layers.1.self_attn.o_proj"
    assert small.ranks.of_module(output) < fast.of_module(output)


def test_marlin_is_asked_for_where_it_is_named():
    """vLLM's own choice for the same checkpoint is another on some GPUs."""
    chosen, marlin = CONTENDERS["int4-g128"], CONTENDERS["marlin-int4-g128"]
    assert (chosen.moe_backend, marlin.moe_backend) == ("auto", "marlin")
    assert chosen.quantization("mixtral", 2) == marlin.quantization("mixtral", 2)


def test_words_are_tokens_there_and_back(tmp_path: Path):
    write_tokenizer(tmp_path, 300)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 300
    ids = [3, 299, 17]
    assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids


def test_a_prompt_of_long_words_is_not_taken_for_one_of_too_many_tokens(tmp_path: Path):
    """As vLLM judges it: by characters, of its longest token for each token."""
    write_tokenizer(tmp_path, 151936)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompt = tokenizer.decode(range(151936 - 1024, 151936))
    assert len(prompt) <= 1024 * max(map(len, tokenizer.get_vocab()))


def test_turns_become_medians_with_their_ends():
    def row(contender: str, turn: int, tpot: float) -> dict:
        about = {"contender": contender, "turn": turn, "load": [128, 128], "concurrency": 16}
        return about | {"tpot": tpot, "ttft": 50.0, "tokens_per_second": 100.0}

    turns = [row("milo", turn, tpot) for turn, tpot in enumerate([8.0, 10.0, 9.0])]
    turns += [row("bf16", turn, tpot) for turn, tpot in enumerate([18.0, 20.0, 19.0])]
    environment = {"vllm": "0.33.0", "device": "a card"}
    text = traffic.format_report({"model": "mixtral", "layers": 32, "environment": environment, "turns": turns})
    assert "| 128 in, 128 out | 16 | milo | 9.00 (8.00 to 10.00) | 1.00 | 50 (50 to 50) | 100 |" in text
    assert "| bf16 | 19.00 (18.00 to 20.00) | 2.11 |" in text


def test_first_tokens_are_the_median_of_many():
    """A turn of few requests would be decided by one moment in which the client does not run."""
    assert [traffic.requests_of(traffic.Load(128, 128), count) for count in (1, 16)] == [3, 32]
    assert [traffic.requests_of(traffic.FIRST, count) for count in (1, 16)] == [16, 96]
    assert traffic.FIRST.concurrency([1, 64, 256]) == [1, 64]


def test_why_answers_are_missing_is_said(monkeypatch: pytest.MonkeyPatch):
    found = {"completed": 13, "total_output_tokens": 26, "errors": ["", "other", "too long\n", "too long", None]}
    monkeypatch.setattr(traffic, "bench_serve", lambda words: found)
    message = "milo: 13 of 16 answers, 26 tokens; the most frequent error: too long$"
    with pytest.raises(RuntimeError, match=message):
        traffic.ask("http://nowhere", Path("milo"), traffic.Load(1024, 2), 1)


def test_a_client_that_did_not_run_is_noticed_and_said():
    """By a call that holds Python's lock, as another process would hold the core."""
    with traffic.watched() as late:
        time.sleep(0.05)
        ctypes.PyDLL(None).usleep(300_000)
    assert max(late) > 0.2
    figures = {"tpot": 2.0, "ttft": 3.0, "tokens_per_second": 4.0}
    turn = {"contender": "milo", "turn": 0, "load": [16, 8], "concurrency": 2, **figures}
    record = {"model": "tiny", "layers": 1, "environment": {"vllm": "0", "device": "CPU"}}
    for stalled, said in ((300.0, True), (3.0, False)):
        report = traffic.format_report(record | {"turns": [turn | {"stalled_ms": stalled}]})
        assert ("kept from running for up to 300 ms" in report) == said


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_servers_are_measured_in_turns(tmp_path: Path):
    """Two servers at once, each asked over HTTP; answers are as long as they should be, or it raises."""
    output = tmp_path / "traffic.json"
    words = ["-o", str(output), "--model", "tiny", "--layers", "1", "--contenders", "milo", "bf16", "--eager"]
    words += ["--serve", "--max-num-batched-tokens 64"]
    traffic.main([*words, "--loads", "16:8", "--concurrency", "2", "--turns", "1"])
    record = json.loads(output.read_text())
    turns = record["turns"]
    assert [row["contender"] for row in turns] == ["milo", "bf16"]
    assert any("milo::fused_moe" in line for line in record["kernels"]["milo"])
    assert not any("milo::" in line for line in record["kernels"]["bf16"])
    report = output.with_suffix(".md").read_text()
    assert "milo::fused_moe" in report
    assert "All servers with `--max-num-batched-tokens 64`." in report
    for row in turns:
        # a busy machine hands over all pieces at once, which moves time from between them to before the first; what an
        # answer takes in all goes by the tokens of all, two requests of 8 at once
        taken = (row["ttft"] + 7 * row["tpot"]) / 1000
        assert row["tpot"] > 0
        assert row["stalled_ms"] > 0
        assert 0.5 < row["tokens_per_second"] * taken / (2 * 8) < 1.5
