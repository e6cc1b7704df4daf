"""Families that vLLM builds or loads otherwise than the converter's first four: real vLLM on hand-made checkpoints.

Each is compared with vLLM itself on the unquantized weights s·(q - z) + UᵀV, so that whatever else vLLM computes
otherwise than transformers, on CPUs above all, is in both.
"""

from __future__ import annotations

import re
from pathlib import Path

import hand_made
import pytest
import vllm_runner
from vllm_jobs import DEVICE, job

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
if DEVICE != "cpu":
    pytestmark.append(pytest.mark.skip(reason="in float32, on the CPU"))

SERVED = {
    "deepseek": [],  # attention without names
    "deepseek_v2": [],  # latent attention
    "minimax_m2": [],  # experts under another block's name
    "dots1": [],  # by vLLM's backend for models of transformers, which renames weight_v
    "solar_open": [],
    "exaone_moe": [],
    "granitemoeshared": [r"re:.*block_sparse_moe.*"],  # shared_mlp.input_linear is two partitions of a layer
    "llama4_text": [r"re:.*self_attn\.[qkv]_proj"],
}
"""Families by model type, with what their checkpoints do not quantize."""
REFUSED = {
    "exaone_moe renamed": r"mlp\.e_score_correction_bias",
    "llama4_text whole": r"q_proj: vLLM reorders the rows .* --ignore",
}
"""Checkpoints that vLLM would serve wrongly without a word, and what the error says."""
MAKERS = {"deepseek": hand_made.make_deepseek, "llama4_text": hand_made.make_llama4}
ENGINE = {
    "dtype": "float32",
    "trust_remote_code": True,
    "compilation_config": {"custom_ops": ["all", "-rotary_embedding"]},  # vLLM's for CPUs turns one head of latent ones
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoints, and the unquantized models they stand for as ``… plain``."""
    root = tmp_path_factory.mktemp("families")
    models: dict[str, Path] = {}
    for family, ignore in SERVED.items():
        source = root / f"{family} source"
        MAKERS.get(family, lambda folder, family=family: hand_made.make_source(family, folder))(source)
        models[family] = hand_made.quantize(source, root / family, ignore=ignore)
        models[f"{family} plain"] = hand_made.dequantized(models[family], root / f"{family} plain")
    renamed = hand_made.quantize(root / "exaone_moe source", root / "exaone_moe renamed")
    models["exaone_moe renamed"] = hand_made.rename(renamed, r"mlp\.e_score", "mlp.gate.e_score")
    models["llama4_text whole"] = hand_made.quantize(root / "llama4_text source", root / "llama4_text whole")
    return models


@pytest.fixture(scope="module")
def outputs(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """vLLM's output on all of them."""
    return vllm_runner.run(job(models, **ENGINE), tmp_path_factory.mktemp("outputs"))


def assert_equal(family: str, found, expected) -> None:
    assert "error" not in expected, expected
    assert "error" not in found, found
    differences = [
        abs(mine - theirs)
        for one, other in zip(found, expected, strict=True)
        for mine, theirs in zip(one["prompt_logprobs"], other["prompt_logprobs"], strict=True)
    ]
    assert len(differences) == 1 + 16 + 63 + 128 + 299
    print(family, "mean", sum(differences) / len(differences), "worst", max(differences))
    assert sum(differences) / len(differences) < 1e-5
    assert max(differences) < 2e-3
    assert [one["generated"] for one in found] == [one["generated"] for one in expected]


@pytest.mark.parametrize("family", SERVED)
def test_equals_the_unquantized_model(family: str, outputs: dict[str, list[dict]]):
    assert_equal(family, outputs[family], outputs[f"{family} plain"])


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("family", ["deepseek", "granitemoeshared"])
def test_two_ranks_equal_the_unquantized_model(family: str, models: dict[str, Path], tmp_path: Path):
    both = {name: models[name] for name in (family, f"{family} plain")}
    outputs = vllm_runner.run(job(both, tensor_parallel_size=2, **ENGINE), tmp_path)
    assert_equal(family, outputs[family], outputs[f"{family} plain"])


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name: str, outputs: dict[str, list[dict]]):
    assert "error" in outputs[name], "was served"
    error = outputs[name]["error"]
    assert error.startswith("CheckpointError: "), error
    assert re.search(REFUSED[name], error), error
