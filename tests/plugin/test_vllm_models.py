"""Real vLLM on MiLo checkpoints equals the Hugging Face model with the weights s·(q - z) + UᵀV."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import vllm_runner
from tiny_models import fuse_experts
from vllm_jobs import DEVICE, DTYPE, MODELS, assert_matches, job

from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.nouns import Recipe
from vllm_milo.offline.ranks.policies import parse_policies

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
TOGETHER = MODELS if DEVICE == "cpu" else []


class Served(dict):
    """vLLM's output on checkpoints, by name, run when it is first asked for: together on CPUs, where a start of vLLM
    takes most of the time, each by itself on GPUs, where compiling does and processes can share it.
    """

    def __init__(self, checkpoints: dict[str, Path], folder: Path, **engine):
        self.checkpoints, self.folder, self.engine = checkpoints, folder, engine

    def __missing__(self, name: str) -> list[dict]:
        names = TOGETHER if name in TOGETHER else [name]
        folder = self.folder / name
        folder.mkdir()
        self.update(vllm_runner.run(job({name: self.checkpoints[name] for name in names}, **self.engine), folder))
        return self[name]


@pytest.fixture(scope="session")
def served(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Served:
    """vLLM's output on all checkpoints."""
    return Served(checkpoints, tmp_path_factory.mktemp("served"), dtype=DTYPE, quantization="milo")


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_dequantized_model(name: str, checkpoints: dict[str, Path], served: Served):
    assert_matches(name, checkpoints, served, DTYPE)


def test_dense_layers_in_16_bits(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As GPUs keep them by default, and there once more with all layers in 3 bits."""
    other = "3bit" if DEVICE == "cuda" else "16bit"
    monkeypatch.setenv("VLLM_MILO_DENSE", other)
    outputs = vllm_runner.run(job({"bundled": checkpoints["bundled"]}, dtype=DTYPE, quantization="milo"), tmp_path)
    assert_matches("bundled", checkpoints, outputs, DTYPE)
    assert ("dense layers in 16 bits" in (tmp_path / "vllm.log").read_text()) == (other == "16bit")


KEPT = {
    "mixtral": ["model.layers.1.block_sparse_moe.experts"],
    "qwen2_moe": [r"re:.*experts\.\d+\..*"],  # all that there are
    "qwen3_moe": [r"re:.*layers\.0\..*experts.*"],
    "fused": ["model.layers.0.mlp.experts"],
}
"""What checkpoints of these families keep of their experts, for vLLM's own unquantized method."""


@pytest.fixture(scope="session")
def kept(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints some of whose experts are not quantized."""
    root = tmp_path_factory.mktemp("kept")
    models = {**sources, "fused": fuse_experts(sources["olmoe"], root / "olmoe")}
    ranks = parse_policies("dense=16,sparse=8")
    return {
        name: convert(
            models[name], root / name, Conversion(Recipe(max_rounds=1), ranks, ignore=ignore), progress=False
        ).out
        for name, ignore in KEPT.items()
    }


def test_kept_experts_equal_the_dequantized_model(kept: dict[str, Path], tmp_path: Path):
    outputs = vllm_runner.run(job(kept, dtype=DTYPE, quantization="milo"), tmp_path)
    for name in KEPT:
        assert_matches(name, kept, outputs, DTYPE)


def test_tensor_parallel_equals_single(checkpoints: dict[str, Path], served: Served, tmp_path: Path):
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    subset = {"bundled": checkpoints["bundled"]}
    parallel = vllm_runner.run(job(subset, dtype=DTYPE, tensor_parallel_size=2), tmp_path)
    assert_matches("bundled", checkpoints, parallel, DTYPE)
    differences = [
        abs(first - second)
        for one, two in zip(served["bundled"], parallel["bundled"], strict=True)
        for first, second in zip(one["prompt_logprobs"], two["prompt_logprobs"], strict=True)
    ]
    if DTYPE == "float32":
        assert max(differences) < 2e-3
    else:  # sums of halves round otherwise
        assert sum(differences) / len(differences) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("names", [TOGETHER] if TOGETHER else [[name] for name in MODELS], ids=",".join)
def test_all_families_in_16_bits(names: list[str], dtype: str, checkpoints: dict[str, Path], tmp_path: Path):
    outputs = vllm_runner.run(job({name: checkpoints[name] for name in names}, dtype=dtype), tmp_path)
    for name in names:
        assert_matches(name, checkpoints, outputs, dtype)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "olmoe"])
def test_all_families_tensor_parallel(name: str, checkpoints: dict[str, Path], tmp_path: Path):
    """Families whose sizes allow it: Mixtral replicates its one K/V head, OLMoE and Qwen2-MoE cut all."""
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    outputs = vllm_runner.run(job({name: checkpoints[name]}, dtype=DTYPE, tensor_parallel_size=2), tmp_path)
    assert_matches(name, checkpoints, outputs, DTYPE)


@pytest.mark.slow
def test_expert_parallel(checkpoints: dict[str, Path], tmp_path: Path):
    """Each of two ranks holds half of the experts whole; attention and shared experts are cut."""
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    subset = {"bundled": checkpoints["bundled"]}
    work = job(subset, dtype=DTYPE, tensor_parallel_size=2, enable_expert_parallel=True)
    assert_matches("bundled", checkpoints, vllm_runner.run(work, tmp_path), DTYPE)
    assert "number of experts: 6/12" in (tmp_path / "vllm.log").read_text()
