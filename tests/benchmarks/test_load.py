"""The benchmark of loading: what it writes is a checkpoint, and it measures a start of vLLM."""

from __future__ import annotations

import json
import logging
import math
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from benchmarks.serving import load
from benchmarks.serving.checkpoints import write_checkpoint
from vllm_milo.checkpoint import MiLoFormat
from vllm_milo.kernels.compiling import underway
from vllm_milo.loading import account
from vllm_milo.validation import validate_checkpoint


def done(seconds: float) -> Future[float]:
    """Return what compiled a kernel in so many seconds."""
    future: Future[float] = Future()
    future.set_result(seconds)
    return future


@pytest.mark.parametrize(("name", "scale", "module"), [("mixtral", 16, "block_sparse_moe"), ("qwen3", 4, "mlp")])
def test_random_checkpoints_are_valid_and_ragged(name: str, scale: int, module: str, tmp_path: Path):
    write_checkpoint(tmp_path / "model", name, layers=2, scale=scale)
    validate_checkpoint(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    ranks = MiLoFormat.from_dict(config["quantization_config"]).ranks
    experts = config.get("num_local_experts") or config["num_experts"]
    projection = "w1" if name == "mixtral" else "gate_proj"
    tables = [ranks.of_experts(f"model.layers.{i}.{module}.experts", projection, experts) for i in range(2)]
    assert tables[0] != tables[1]
    assert min(tables[0]) == 0
    assert max(tables[0]) == 96
    assert max(tables[1]) == 48


def test_the_slowest_process_counts(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(account, "_current", account.Load())
    with caplog.at_level(logging.INFO, logger="vllm.milo"):
        for layer in ("a", "b"):
            account.make(layer)
        for layer in ("a", "b", "b"):
            account.finish(layer, torch.device("cpu"))
        underway.add([done(1.5), done(2.0)])
        underway.settle()
        underway.settle()
    line, kernels = caplog.messages
    found = load.parts_of(kernels + line)
    assert (found["kernels"], found["compiling_threads"]) == (2, 3.5)
    assert load.parts_of(line)["layers"] == 2
    other = line.replace("loaded 2", "loaded 3").replace("at most 0.00", "at most 1.50")
    found = load.parts_of(f"{other}\n{line}")
    assert (found["layers"], found["peak_gib"]) == (3, 1.5)
    with pytest.raises(SystemExit, match="no load"):
        load.parts_of("Model loading took 3 s")


@pytest.mark.vllm
def test_start_to_first_token_of_the_bundled_model(checkpoints: dict[str, Path], tmp_path: Path, capsys):
    out = tmp_path / "load.json"
    load.main([str(checkpoints["bundled"]), "-o", str(out), "--starts", "1", "--eager"])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["layers"] > 4
    assert all(math.isfinite(row[field]) for field in load.FIELDS)
    assert 0 < row["reading"] < row["load"] < row["engine"] < row["first_token"]
    assert row["repacking"] + row["warming_up"] < row["load"]
    assert "nothing cached" in capsys.readouterr().out


@pytest.mark.vllm
@pytest.mark.slow
def test_start_to_first_token_of_a_model_that_is_quantized_at_load(tmp_path: Path, capsys):
    """In the shapes of Qwen3, a quarter of its sizes."""
    out, folder = tmp_path / "load.json", tmp_path / "model"
    words = ["--model", "qwen3", "--layers", "1", "--scale", "4", "--folder", str(folder), "--quantize"]
    load.main([*words, "-o", str(out), "--starts", "1", "--eager"])
    record = json.loads(out.read_text())
    (row,) = record["rows"]
    # q, k, v, o and three of each of 128 experts
    assert (record["quantized"], row["matrices"]) == (True, 4 + 3 * 128)
    assert 0 < row["solving"] < row["first_token"]
    assert "solving" in capsys.readouterr().out
