"""The attention's cache in FP8: answers stay close to those with a cache in 16 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import vllm_runner
from vllm_jobs import job

# vLLM's CPU build has it where the processor has AVX-512 or AMX alone
pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]


def test_answers_are_close(checkpoints: dict[str, Path], tmp_path: Path):
    found = {}
    for kind in ("auto", "fp8"):
        folder = tmp_path / kind
        folder.mkdir()
        engine = {"dtype": "bfloat16", "quantization": "milo", "kv_cache_dtype": kind}
        found[kind] = vllm_runner.run(job({"bundled": checkpoints["bundled"]}, **engine), folder)["bundled"]
        assert "error" not in found[kind], found[kind]
    differences = [
        abs(first - second)
        for one, other in zip(found["auto"], found["fp8"], strict=True)
        for first, second in zip(one["prompt_logprobs"], other["prompt_logprobs"], strict=True)
    ]
    assert 0 < sum(differences) / len(differences) < 0.1
