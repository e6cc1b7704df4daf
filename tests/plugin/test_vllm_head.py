"""The output head in 8 and 4 bits, served: answers are those of the dequantized model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import vllm_runner
from tiny_models import make_model
from vllm_jobs import DEVICE, DTYPE, assert_matches, job

from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.nouns import Recipe

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
NAMES = {8: "lm_head 8", 4: "lm_head 4"}


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints with a vocabulary that vLLM pads, by the bits of their heads."""
    root = tmp_path_factory.mktemp("heads")
    source = make_model("qwen3_moe", root / "source", vocab_size=330)
    recipe = Recipe(method="rtn", group_size=64)
    return {
        name: convert(source, root / str(bits), Conversion(recipe, lm_head_bits=bits), progress=False).out
        for bits, name in NAMES.items()
    }


def test_equals_the_dequantized_model(heads: dict[str, Path], tmp_path: Path):
    """Also where weights are loaded once more."""
    outputs = vllm_runner.run(job(heads, dtype=DTYPE, quantization="milo") | {"reload": True}, tmp_path, timeout=800)
    for name in heads:
        assert_matches(name, heads, outputs, DTYPE)


@pytest.mark.slow
def test_tensor_parallel(heads: dict[str, Path], tmp_path: Path):
    if DEVICE == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    four = {NAMES[4]: heads[NAMES[4]]}  # both are cut by rows alike
    outputs = vllm_runner.run(job(four, dtype=DTYPE, tensor_parallel_size=2), tmp_path, timeout=800)
    assert_matches(NAMES[4], four, outputs, DTYPE)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_kernels_with_graphs(dtype: str, heads: dict[str, Path], tmp_path: Path):
    """torch.compile and CUDA graphs on; vLLM's own kernel multiplies with the integers."""
    outputs = vllm_runner.run(job(heads, dtype=dtype, enforce_eager=False), tmp_path, timeout=800)
    for name in heads:
        assert_matches(name, heads, outputs, dtype)
    assert "for mixed-precision linear" in (tmp_path / "vllm.log").read_text()
