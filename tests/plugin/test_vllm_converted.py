"""Families that vLLM serves by the table: the converter's own checkpoints equal what they stand for.

``python tests/served_families.py`` prints the same comparison as a table.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cpu_router import ROUTER
from served_families import KINDS, Difference, between, make, reference, serve
from tiny_families import TINY
from tiny_models import compare, make_prompts
from vllm_jobs import DEVICE

from vllm_milo.offline.evaluation.model import load_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(3600)]
if DEVICE != "cpu":
    pytestmark.append(pytest.mark.skip(reason="in float32, on the CPU"))

QUICK = ("minimax_m2", "granitemoehybrid", "lfm2_moe", "gpt_oss", "nemotron_h")
"""What no hand-made checkpoint has: a router's bias; layers kept under another name than vLLM's; w1 and w3 in one;
experts with biases and a clamped activation, whose model loads them by itself; experts without a gate, on a latent."""
SLOW = (
    "hunyuan_v1_moe",
    "deepseek",
    "qwen3_next",
    "bailing_hybrid",
    "step3_text",
    "aria",
    "longcat_flash",
    "jamba",
    "kimi_linear",
)
"""Each of another kind: norms after rotation, layers without a name, attention without a softmax, and that beside
latent attention of which checkpoints call a part otherwise; a model that loads all experts of a layer at once, and one
that also builds its shared expert without a name and calls its layers otherwise than they are; two attentions and dense
parts in a layer, with experts that have no weights; Mamba-1; and delta attention with a gate for every key."""
LARGEST = {"float32": (1e-5, 2e-3), "bfloat16": (0.1, 1.0)}
"""Mean and worst difference, by what vLLM computes in; without the factors of any part of a layer the mean is 0.2."""
Made = tuple[dict[str, dict[str, Path]], dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...], tuple[str, ...]], Made]:
    """Returns the folders of families and vLLM's outputs on them, all by one process."""
    if importlib.util.find_spec(ROUTER) is None:
        pytest.skip("this version of vLLM has no router for CPUs that could be mended")

    @cache
    def run(names: tuple[str, ...], kinds: tuple[str, ...]) -> Made:
        root = tmp_path_factory.mktemp("served")
        made = {name: make(name, root / name, kinds) for name in names}
        return made, serve(made, root / "outputs")

    return run


def assert_served(name: str, made: Made, kinds: Iterable[str]) -> None:
    """Assert that checkpoints give in vLLM what they stand for, there and in transformers."""
    folders, found = made[0][name], made[1][name]
    mean, worst = LARGEST[TINY[name].dtype]
    for kind in kinds:
        plain = f"{kind} plain"
        assert "error" not in found[kind], found[kind]
        compared = {}
        if TINY[name].unquantized:
            assert "error" not in found[plain], found[plain]
            compared["vLLM"] = between(found[kind], found[plain])
        folder = reference(name, folders, kind)
        if folder is not None:
            there = compare(load_model(folder), make_prompts(folder), found[kind])
            compared["transformers"] = Difference.of(there.differences)
            assert max(there.shortfalls) < worst, f"{name} {kind}: transformers would go on otherwise after a prompt"
        for other, difference in compared.items():
            assert difference.mean < mean, f"{name} {kind}: {difference} from the unquantized model in {other}"
            assert difference.worst < worst, f"{name} {kind}: {difference} from the unquantized model in {other}"


@pytest.mark.parametrize("name", QUICK)
def test_rank_16_on_every_matrix(name: str, served):
    """Ranks that are nowhere 0 show every name that is wrong."""
    kinds = ("rank 16",)
    assert_served(name, served(QUICK, kinds), kinds)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_the_default_and_rank_16(name: str, served):
    """All families take half an hour: ``python tests/served_families.py``."""
    assert_served(name, served(SLOW, KINDS), KINDS)
