"""Pipeline parallelism: each process has the layers of its stage, and misses none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import vllm_runner
from vllm_jobs import DEVICE, DTYPE, assert_matches, job

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("tensor_parallel", [1, pytest.param(2, marks=pytest.mark.gpu)])
def test_two_stages(tensor_parallel: int, checkpoints: dict[str, Path], tmp_path: Path):
    if DEVICE == "cuda" and torch.cuda.device_count() < 2 * tensor_parallel:
        pytest.skip(f"needs {2 * tensor_parallel} GPUs")
    todo = job({"bundled": checkpoints["bundled"]}, dtype=DTYPE, quantization="milo")
    todo["engine"] |= {"pipeline_parallel_size": 2, "tensor_parallel_size": tensor_parallel}
    if DEVICE == "cpu":
        todo["engine"] |= {"worker_extension_cls": "cpu_pipeline.Extension"}
    assert_matches("bundled", checkpoints, vllm_runner.run(todo, tmp_path, timeout=800), DTYPE)
