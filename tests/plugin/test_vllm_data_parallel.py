"""Data parallelism: two engines answer as one does, with the experts cut over both or dealt to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.serving.server import post, serve

# with vLLM's CPU build (0.32) both engines start, and the first request ends in the NotImplementedError of all_gatherv,
# which its communicator of CPUs does not have
pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1200)]
SMALL = ["--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "8", "--dtype", "bfloat16"]
SMALL += ["--gpu-memory-utilization", "0.15", "--kv-cache-memory-bytes", str(2**30)]
PROMPTS = ["The function returns", "In the morning the old man", "To install the package, run", "The definition of"]


def first_tokens(url: str) -> list[float]:
    """Return the log-probabilities of the likeliest first token of each answer."""
    bodies = [{"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 0} for prompt in PROMPTS * 2]
    choices = [post(url, "/v1/completions", **body)["choices"][0] for body in bodies]
    return [choice["logprobs"]["token_logprobs"][0] for choice in choices]


@pytest.mark.parametrize("options", [[], ["--enable-expert-parallel"]], ids=["cut", "dealt"])
def test_two_engines(options: list[str], checkpoints: dict[str, Path], tmp_path: Path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    folder = checkpoints["bundled"]
    with serve(folder, *SMALL, log=tmp_path / "one.log") as url:
        expected = first_tokens(url)
    with serve(folder, *SMALL, "--data-parallel-size", "2", *options, log=tmp_path / "two.log", timeout=600) as url:
        found = first_tokens(url)
    assert found == pytest.approx(expected, abs=0.1)
