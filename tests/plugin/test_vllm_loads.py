"""What vLLM's CPU build cannot run is loaded whole there: every name is one that vLLM's loader of the family knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from folder_edits import edit_config, edit_tensors
from quantized_sources import write_own
from tiny_families import make_family
from tiny_without_class import LING_3
from vllm_jobs import DEVICE
from vllm_loads import load

from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.nouns import Recipe
from vllm_milo.offline.ranks.policies import parse_policies

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]
if DEVICE != "cpu":
    pytestmark.append(pytest.mark.skip(reason="in float32, on the CPU"))

UNIFORM = Conversion(Recipe(max_rounds=1), parse_policies("uniform=16"))
SHARD = "model-00001-of-00001.safetensors"


def make(root: Path, name: str, architecture: str, **changes: Any) -> Path:
    """Convert a tiny model with rank 16 on every matrix."""
    source = make_family(name, root / "source" / name, **changes)
    edit_config(source, architectures=[architecture])
    return convert(source, root / name, UNIFORM, progress=False).out


def make_of_own_files(root: Path) -> Path:
    """Convert a tiny DeepSeek-V4 from files as its makers have them, with experts that config.json says are in FP4."""
    plain = make_family("deepseek_v4", root / "plain" / "model")
    own = write_own(plain, root / "own", "fp4").source
    return convert(own, root / "of-own-files", UNIFORM, progress=False).out


IN_NEED = "GLM-5.3-Flash"
"""What vLLM imports torchvision for."""
HY4 = {"enable_ihc": True, "gated_mla": True, "gating_type": "elementwise", "learnable_sink": True}
MADE: dict[str, Callable[[Path], Path]] = {
    "Ling-3": lambda root: make(root, "bailing_hybrid", "BailingMoeV3ForCausalLM", **LING_3),
    "DeepSeek-V4": lambda root: make(root, "deepseek_v4", "DeepseekV4ForCausalLM"),
    "Kimi-K2.5": lambda root: make(root, "kimi_k25", "KimiK25ForConditionalGeneration"),
    "DeepSeek-V3.2": lambda root: make(root, "deepseek_v32", "DeepseekV32ForCausalLM"),
    "GLM-5": lambda root: make(root, "glm_moe_dsa", "GlmMoeDsaForCausalLM"),
    "Hy4": lambda root: make(root, "hy_v4", "HYV4ForCausalLM", **HY4),
    "GLM-5.3-Flash": lambda root: make(root, "glm5_next", "Glm5NextForConditionalGeneration"),
    "DeepSeek-V4's own files": make_of_own_files,
}
QUANTIZED = {
    "Ling-3": 14,
    "DeepSeek-V4": 18,
    "DeepSeek-V4's own files": 18,
    "Kimi-K2.5": 13,
    "DeepSeek-V3.2": 13,
    "GLM-5": 13,
    "Hy4": 23,
    "GLM-5.3-Flash": 11,
}
"""Numbers of vLLM's layers that hold quantized matrices."""


def assert_loaded(names: Iterable[str], place: Path) -> None:
    """Assert that vLLM loads checkpoints whole, and that so many of its layers are MiLo's."""
    made = {name: MADE[name](place / name) for name in names}
    loaded = load(list(made.values()), place)
    assert {name: loaded[str(folder)] for name, folder in made.items()} == {name: QUANTIZED[name] for name in made}


def test_loaded_whole(tmp_path: Path):
    assert_loaded([name for name in MADE if name != IN_NEED], tmp_path)


@pytest.mark.skipif(find_spec("torchvision") is None, reason="vLLM imports torchvision for it")
def test_loaded_whole_with_torchvision(tmp_path: Path):
    assert_loaded([IN_NEED], tmp_path)


def test_a_tensor_that_is_missing(tmp_path: Path):
    """Of what is not quantized: of what is, headers say so."""
    folder, name = MADE["Ling-3"](tmp_path), "model.layers.0.{}.f_proj.weight"
    edit_tensors(folder, SHARD, lambda tensors: tensors.pop(name.format("attention")))
    found = load([folder], tmp_path)[str(folder)]
    assert f"the checkpoint has no tensor that vLLM loads as {name.format('self_attn')}" in found
