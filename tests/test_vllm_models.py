"""Real vLLM on MiLo checkpoints equals the Hugging Face model with the weights s·(q - z) + UᵀV."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import vllm_runner
from tiny_models import FAMILIES, compare, make_prompts

from vllm_milo.offline.evaluation.model import load_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
MODELS = [*FAMILIES, "bundled"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOGETHER = MODELS if DEVICE == "cpu" else []
DTYPE = "bfloat16" if DEVICE == "cuda" else "float32"  # float32, so that little rounding hides errors
EAGER = {"enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8}
if DEVICE == "cuda":
    # other tests may use the GPU too, and every kernel has to be compiled
    EAGER |= {"gpu_memory_utilization": 0.15, "kv_cache_memory_bytes": 2**30, "max_num_batched_tokens": 512}


def job(checkpoints: dict[str, Path], **engine) -> dict:
    """Return a job that runs all given checkpoints."""
    models = {name: str(folder) for name, folder in checkpoints.items()}
    prompts = {name: make_prompts(folder) for name, folder in checkpoints.items()}
    return {"models": models, "prompts": prompts, "max_tokens": 12, "engine": {**EAGER, **engine}}


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


def assert_matches(name: str, checkpoints: dict[str, Path], outputs: dict, dtype: str) -> None:
    """Assert that vLLM's log-probabilities and greedy tokens are those of the dequantized model in float32."""
    assert "error" not in outputs[name], outputs[name]
    model = load_model(checkpoints[name], torch.float32, DEVICE)
    found = compare(model, make_prompts(checkpoints[name]), outputs[name])
    assert len(found.differences) == 1 + 16 + 63 + 128 + 299
    mean, worst = sum(found.differences) / len(found.differences), max(found.differences)
    if dtype == "float32":
        assert mean < 1e-4
        assert worst < 2e-3
        assert max(found.shortfalls) < 2e-3
    else:
        # in 16 bits a router's near-tie may fall the other way, which moves a few tokens of a random model
        outliers = sum(value > 0.3 for value in found.differences + found.shortfalls)
        assert mean < 0.05
        assert outliers <= (2 if name == "bundled" else 10)


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_dequantized_model(name: str, checkpoints: dict[str, Path], served: Served):
    assert_matches(name, checkpoints, served, DTYPE)


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
