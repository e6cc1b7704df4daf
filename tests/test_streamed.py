"""Calibration a layer at a time: the same moments of inputs as the whole model gives."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, VOCABULARY, make_model

from vllm_milo.offline.calibration import calibrate
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.evaluate import load_model
from vllm_milo.offline.inspect import inspect_checkpoint
from vllm_milo.offline.reader import ModelReader
from vllm_milo.offline.recipe import Recipe
from vllm_milo.offline.streamed import calibrate_streamed


@pytest.fixture
def windows():
    return torch.randint(0, VOCABULARY, (3, 48), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_the_whole_model(family, tmp_path, windows):
    folder = make_model(family, tmp_path / "model")
    reader = ModelReader(folder)
    streamed, whole = calibrate_streamed(reader, windows), calibrate(load_model(folder), windows)
    assert streamed.tokens == whole.tokens
    for matrix in reader.matrices:
        found, expected = streamed.inputs[matrix.name], whole.inputs[matrix.name]
        assert found.rows == expected.rows, matrix.name
        if expected.total is not None:
            scale = expected.total.abs().max()
            assert torch.allclose(found.total / scale, expected.total / scale, atol=1e-4), matrix.name


def test_converts_within_a_budget(tmp_path, windows):
    folder = make_model("mixtral", tmp_path / "model")
    calibration = calibrate_streamed(ModelReader(folder), windows)
    conversion = Conversion(Recipe(max_rounds=2), budget_bits=3.75, calibration=calibration)
    convert(folder, tmp_path / "out", conversion, progress=False)
    assert 3.5 < inspect_checkpoint(tmp_path / "out")["bits_per_weight"] <= 3.75
