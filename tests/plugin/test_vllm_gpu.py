"""vLLM on a GPU as users run it: torch.compile and CUDA graphs on, with and without the flag."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import vllm_runner
from tiny_models import logprobs
from transformers import AutoTokenizer
from vllm_jobs import MODELS, assert_matches, job

from benchmarks.serving.server import post, serve
from vllm_milo.offline.evaluation.model import load_model

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]
SIZE = ["--max-model-len", "512", "--max-num-seqs", "16", "--max-num-batched-tokens", "512"]
SIZE += ["--gpu-memory-utilization", "0.15", "--kv-cache-memory-bytes", str(2**30)]
PROMPTS = ["The function returns", "In the morning the old man", "To install the package, run", "The definition of"]


@pytest.mark.parametrize("flag", [["--quantization", "milo"], []], ids=["flag", "config.json"])
def test_server_with_graphs(flag: list[str], checkpoints: dict[str, Path], tmp_path: Path):
    """Prompt log-probabilities over HTTP are those of the dequantized model; graphs replay for every batch."""
    folder, log = checkpoints["bundled"], tmp_path / "server.log"
    model = load_model(folder, torch.float32, "cuda")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with serve(folder, *flag, *SIZE, log=log) as url:
        alone = [complete(url, prompt) for prompt in PROMPTS]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda prompt: complete(url, prompt), PROMPTS * 4))
    for choice in alone + together:
        ids = tokenizer(choice["text"], add_special_tokens=False)["input_ids"]
        table = logprobs(model, ids)
        expected = [float(table[i, token]) for i, token in enumerate(ids[1:])]
        found = choice["logprobs"]["token_logprobs"][1:]
        differences = [abs(a - b) for a, b in zip(found, expected, strict=True)]
        assert sum(differences) / len(differences) < 0.06
        assert max(differences) < 0.6
    text = log.read_text()
    assert "milo::fused_moe on cuda runs on the triton backend" in text
    assert "Capturing CUDA graphs" in text or "Graph capturing finished" in text


def complete(url: str, prompt: str) -> dict:
    """Return prompt and answer with the log-probability of every token."""
    answer = post(url, "/v1/completions", prompt=prompt, temperature=0, max_tokens=12, echo=True, logprobs=0)
    return answer["choices"][0]


@pytest.mark.parametrize("name", MODELS)
def test_every_family_with_graphs(name: str, checkpoints: dict[str, Path], tmp_path: Path):
    """In-process, torch.compile and CUDA graphs on (the eager run is in test_vllm_models)."""
    subset = {name: checkpoints[name]}
    outputs = vllm_runner.run(job(subset, dtype="bfloat16", enforce_eager=False), tmp_path, timeout=800)
    assert_matches(name, checkpoints, outputs, "bfloat16")
