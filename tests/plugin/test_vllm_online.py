"""16-bit models that vLLM quantizes while it loads them: what it serves is what ``milo quantize`` would have made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_runner
from tiny_models import compare, make_prompts
from vllm_jobs import DEVICE, DTYPE, assert_matches, job

from vllm_milo.offline.cli import main
from vllm_milo.offline.evaluation.model import load_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]
FEW = {"max_rounds": 1}


def checkpoint(source: Path, out: Path, *options: str) -> Path:
    """What the converter makes by the same method."""
    few = ["--max-rounds", "1", "--device", DEVICE, "--quiet"]
    assert main(["quantize", str(source), "-o", str(out), "--preset", "fast", *few, *options]) == 0
    return out


def serve(
    models: dict[str, Path], folder: Path, options: dict[str, Any] | None = None, **engine: Any
) -> dict[str, Any]:
    """vLLM's outputs of models, quantized at load where ``options`` are given."""
    folder.mkdir()
    if options is not None:
        overrides = {"quantization_config_dict_json": json.dumps(options)}
        engine |= {"quantization": "milo", "hf_overrides": overrides}
    return vllm_runner.run(job(models, dtype=DTYPE, **engine), folder, timeout=1500)


def distance(source: Path, outputs: list[dict[str, Any]]) -> float:
    """Return the mean difference of log-probabilities from the model in 16 bits."""
    found = compare(load_model(source, torch.float32, DEVICE), make_prompts(source), outputs).differences
    return sum(found) / len(found)


def test_it_serves_what_the_converter_makes(sources: dict[str, Path], odd_model: Path, tmp_path: Path):
    """Fused and single layers, shared experts, a layer whose groups are smaller."""
    names = ("mixtral", "qwen2_moe", "olmoe")
    models = {name: sources[name] for name in names} | {"odd": odd_model}
    made = {name: checkpoint(source, tmp_path / name) for name, source in models.items()}
    found, offline = serve(models, tmp_path / "online", FEW), serve(made, tmp_path / "offline")
    for name in models:
        assert_matches(name, made, offline, DTYPE)
        if DEVICE == "cpu":
            assert offline[name] == found[name]
        else:  # the solver adds up in another order in other batches, which gives other codes of the same worth
            ratio = distance(models[name], found[name]) / distance(models[name], offline[name])
            assert 0.8 < ratio < 1.25, f"{name}: {ratio}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", [{"tensor_parallel_size": 2}, {"tensor_parallel_size": 2, "enable_expert_parallel": True}]
)
def test_over_several_processes(sources: dict[str, Path], tmp_path: Path, engine: dict[str, Any]):
    if DEVICE != "cpu":
        pytest.skip("two processes on the CPU")
    models = {"qwen2_moe": sources["qwen2_moe"]}
    options = {**FEW, "ignore": ["re:.*shared_expert.*"], "group_size": 32, "budget_bits": 4.4}
    asked = ["--ignore", "re:.*shared_expert.*", "--group-size", "32", "--budget-bits", "4.4"]
    made = {"qwen2_moe": checkpoint(models["qwen2_moe"], tmp_path / "made", *asked)}
    assert_matches("qwen2_moe", made, serve(models, tmp_path / "online", options, **engine), DTYPE)


def test_it_is_not_loaded_once_more(sources: dict[str, Path], tmp_path: Path):
    overrides = {"quantization_config_dict_json": json.dumps(FEW)}
    todo = job({"olmoe": sources["olmoe"]}, dtype=DTYPE, quantization="milo", hf_overrides=overrides)
    said = vllm_runner.run(todo | {"reload": True}, tmp_path)["olmoe"]["error"]
    assert "weights that were quantized while they were loaded cannot be loaded once more" in said


def test_what_cannot_be_quantized_is_said_in_a_line(sources: dict[str, Path], tmp_path: Path):
    dense = tmp_path / "dense"
    dense.mkdir()
    for file in sources["mixtral"].iterdir():
        (dense / file.name).symlink_to(file)
    config = json.loads((dense / "config.json").read_text()) | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
    }
    del config["num_local_experts"]
    (dense / "config.json").unlink()
    (dense / "config.json").write_text(json.dumps(config))
    said = serve({"dense": dense}, tmp_path / "online", FEW)["dense"]["error"]
    assert "model_type 'llama' is not a Mixture-of-Experts model" in said
    assert "vLLM serves the model as it is without --quantization milo" in said
