"""Prefix caching and chunked prefill change no answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import vllm_runner
from vllm_jobs import DTYPE, assert_same_answers, job

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


def answers(folder: Path, tmp_path: Path, **engine) -> list[list[dict]]:
    tmp_path.mkdir()
    todo = job({"bundled": folder}, dtype=DTYPE, quantization="milo", **engine) | {"rounds": 2}
    found = vllm_runner.run(todo, tmp_path)["bundled"]
    assert "error" not in found, found
    return found


def test_answers_are_those_without(checkpoints: dict[str, Path], tmp_path: Path):
    folder = checkpoints["bundled"]
    off = {"enable_prefix_caching": False, "max_num_batched_tokens": 512}
    plain, again = answers(folder, tmp_path / "plain", **off, enable_chunked_prefill=False)
    assert_same_answers(plain, again)
    assert not any(one["cached"] for one in again)
    # the longest prompt has 300 tokens, and steps have 64
    chunks = {"enable_chunked_prefill": True, "max_num_batched_tokens": 64}
    first, cached = answers(folder, tmp_path / "both", **chunks, enable_prefix_caching=True)
    assert max(one["cached"] for one in cached) >= 128
    if DTYPE == "float32":
        assert_same_answers(plain, first)
        assert_same_answers(plain, cached)
    else:  # sums of halves round otherwise in batches of another size
        for one, other in zip(plain * 2, first + cached, strict=True):
            assert abs(one["logprobs"][0] - other["logprobs"][0]) < 0.3
