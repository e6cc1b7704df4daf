"""Calibration a layer at a time: the same moments of inputs as the whole model gives."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import FAMILIES, TEXT, VOCABULARY, make_model

from vllm_milo.offline.calibration import memory
from vllm_milo.offline.calibration.streamed import calibrate_streamed
from vllm_milo.offline.calibration.whole_model import calibrate
from vllm_milo.offline.checkpoint.inspect import inspect_checkpoint
from vllm_milo.offline.cli import main
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.evaluation.model import load_model
from vllm_milo.offline.nouns import Recipe
from vllm_milo.offline.source.reader import ModelReader


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


def test_command_line_streams_what_does_not_fit(bundled_model, tmp_path, monkeypatch, capsys):
    arguments = ["quantize", str(bundled_model), "-o", str(tmp_path / "out"), "--preset", "best", "--max-rounds", "1"]
    arguments += ["--calibration", str(TEXT), "--calibration-windows", "2", "--quiet"]
    need = memory.whole_model_need(ModelReader(bundled_model))
    monkeypatch.setattr(memory, "available", lambda device: need - 1)
    assert main([*arguments, "--calibration-moments", "full"]) == 1
    assert "use --calibration-moments inputs" in capsys.readouterr().err
    assert main(arguments) == 0
    assert "moments of inputs alone" in capsys.readouterr().err
    recipe = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["recipe"]
    assert recipe["calibration_moments"] == "inputs"
    monkeypatch.setattr(memory, "available", lambda device: 2**20)
    assert main([*arguments, "--overwrite"]) == 1
    assert "--calibration needs" in capsys.readouterr().err


def test_need_covers_what_the_moments_take(tmp_path, windows):
    reader = ModelReader(make_model("qwen2_moe", tmp_path / "model"))
    calibration = calibrate_streamed(reader, windows)
    moments = {id(m): m for m in calibration.inputs.values() if m.total is not None}
    held = sum(moment.total.numel() * moment.total.element_size() for moment in moments.values())
    assert 0.5 * memory.moments_need(reader) < held <= memory.moments_need(reader)
    parameters = sum(p.numel() for p in load_model(reader.folder).parameters())
    assert memory.whole_model_need(reader) > 4 * parameters + memory.moments_need(reader)
