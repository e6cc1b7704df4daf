"""Sleep mode: an engine that has slept answers as before, with weights that were kept on the host or loaded again."""

from __future__ import annotations

from pathlib import Path

import pytest
import vllm_runner
from vllm_jobs import assert_same_answers, job

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("name", ["qwen2_moe", "bundled"])  # what sleeps is alone in its process
def test_answers_are_the_same_after_waking(
    name: str, level: int, eager: bool, checkpoints: dict[str, Path], tmp_path: Path
):
    engine = {"dtype": "bfloat16", "quantization": "milo", "enable_sleep_mode": True, "enforce_eager": eager}
    # what the cache held is gone, and must not be taken for what was
    todo = job({name: checkpoints[name]}, **engine, enable_prefix_caching=True)
    found = vllm_runner.run(todo | {"rounds": 3, "sleep": level}, tmp_path)
    assert "error" not in found[name], found[name]
    before, *after = found[name]
    for answers in after:
        assert_same_answers(before, answers, tolerance=1e-6)
