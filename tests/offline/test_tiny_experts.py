"""Experts that are tiny or dead: stored as exactly as the format allows, with a warning that names them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from folder_edits import edit_tensors
from refusals import FAST, WEIGHTS
from safetensors.torch import load_file
from tiny_models import VOCABULARY

from vllm_milo.offline.checkpoint.dequantize import DequantizedTensors
from vllm_milo.offline.conversion import Conversion, Summary, Text
from vllm_milo.offline.convert import convert
from vllm_milo.offline.learn.layer import LearnOptions
from vllm_milo.offline.nouns import Recipe
from vllm_milo.offline.ranks.policies import parse_policies
from vllm_milo.offline.solve.base.group import MIN_SCALE
from vllm_milo.validation import validate_checkpoint

EXPERT = "model.layers.1.block_sparse_moe.experts.2"
WINDOWS = torch.randint(0, VOCABULARY, (8, 64), generator=torch.Generator().manual_seed(0))
TEXT = Text("random", WINDOWS, LearnOptions(steps=12, batch=4))
HOW = {
    "rtn": Conversion(Recipe("rtn")),
    "hqq": Conversion(Recipe("hqq")),
    "paper": Conversion(Recipe("paper", max_rounds=2), parse_policies("uniform=8")),
    "without text": Conversion(Recipe(max_rounds=2, base="hqq"), parse_policies("uniform=8")),
    "with text": Conversion(FAST, parse_policies("uniform=8"), text=TEXT),
    "with text, 16 bits": Conversion(Recipe(max_rounds=1, factor_bits=16), parse_policies("uniform=8"), text=TEXT),
}


def convert_scaled(source: Path, out: Path, factor: float, how: str) -> tuple[Summary, dict[str, float]]:
    """Convert a model with one expert times a factor; return the relative errors of its matrices, or their sizes."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.startswith(EXPERT):
                tensors[name] *= factor

    edit_tensors(source, WEIGHTS, edit)
    summary = convert(source, out, HOW[how], progress=False)
    weights = DequantizedTensors(out, validate_checkpoint(out), torch.float32)
    errors = {}
    for name, tensor in load_file(source / WEIGHTS).items():
        if name.startswith(EXPERT):
            found = weights.weight(name.removesuffix(".weight"))
            assert torch.isfinite(found).all()
            error, size = (found - tensor.float()).norm(), tensor.float().norm()
            errors[name] = float(error / size if factor else found.abs().max())
    assert len(errors) == 3
    return summary, errors


@pytest.mark.parametrize("how", HOW)
def test_an_expert_below_the_normal_range(how: str, source: Path, tmp_path: Path):
    """Times 1e-3, scales are subnormal multiples of 2^-24, and hardly less exact."""
    summary, errors = convert_scaled(source, tmp_path / "out", 1e-3, how)
    assert max(errors.values()) < 0.3
    [warning] = [warning for warning in summary.warnings if "normal range" in warning]
    assert warning.startswith(f"{EXPERT}: so small that scales lie below fp16's normal range")


@pytest.mark.parametrize("how", HOW)
def test_an_expert_of_about_the_smallest_scale(how: str, source: Path, tmp_path: Path):
    """Times 1e-6, steps of codes are as large as weights: no error is larger than those."""
    summary, errors = convert_scaled(source, tmp_path / "out", 1e-6, how)
    assert max(errors.values()) < 1.2
    assert any(warning.startswith(EXPERT) for warning in summary.warnings)
    weights = DequantizedTensors(tmp_path / "out", validate_checkpoint(tmp_path / "out"), torch.float32)
    assert weights.stored(f"{EXPERT}.w1.weight_scale").float().min() >= MIN_SCALE


@pytest.mark.parametrize("how", HOW)
def test_a_dead_expert(how: str, source: Path, tmp_path: Path):
    """Stored exactly, and no training wakes it."""
    summary, sizes = convert_scaled(source, tmp_path / "out", 0, how)
    assert set(sizes.values()) == {0}
    assert any(warning.startswith(f"{EXPERT}: all weights are 0") for warning in summary.warnings)


def test_ordinary_models_are_not_warned_of(source: Path, tmp_path: Path):
    assert convert(source, tmp_path / "out", HOW["hqq"], progress=False).warnings == []
