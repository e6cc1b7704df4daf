"""The calibration that the command takes: the weights by default, plain squares with the paper's method, or a text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_milo.offline.calibration.gram import WeightMoments
from vllm_milo.offline.calibration.moment_source import PlainSquares
from vllm_milo.offline.cli import main
from vllm_milo.offline.convert import convert


def recipe_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]["recipe"]


def test_the_default_needs_nothing_but_the_weights(sources: dict[str, Path], tmp_path: Path, monkeypatch):
    rounds = []
    monkeypatch.setattr(
        "vllm_milo.offline.cli.quantize.convert", lambda *a, **o: rounds.append(a[2]) or convert(*a, **o)
    )
    monkeypatch.setattr("vllm_milo.offline.cli.quantize.ROUNDS", 3)
    arguments = ["quantize", str(sources["olmoe"]), "--quiet", "-o"]
    for number, options in enumerate([[], ["--preset", "small"], ["--method", "milo", "--ranks", "dense=8"]]):
        out = tmp_path / str(number)
        assert main([*arguments, str(out), *options]) == 0
        record = recipe_of(out)
        assert (record["calibration"], record["max_rounds"], record["feedback_rounds"]) == ("weights", 3, 2)
        assert isinstance(rounds.pop().calibration, WeightMoments)
    out = tmp_path / "none"
    assert main([*arguments, str(out), "--calibration", "none", "--max-rounds", "1"]) == 0
    assert "calibration" not in recipe_of(out)
    assert isinstance(rounds.pop().calibration, PlainSquares)
    out = tmp_path / "paper"
    assert main([*arguments, str(out), "--method", "paper", "--ranks", "dense=8", "--max-rounds", "1"]) == 0
    assert isinstance(rounds.pop().calibration, PlainSquares)


@pytest.mark.parametrize("calibration", ["weights", "none"])
def test_moments_of_a_text_need_one(bundled_model: Path, tmp_path: Path, capsys, calibration: str):
    options = ["--calibration", calibration, "--calibration-moments", "full", "--quiet"]
    assert main(["quantize", str(bundled_model), "-o", str(tmp_path / "out"), *options]) == 1
    assert "--calibration-moments full is about a text: add --calibration TEXT or self" in capsys.readouterr().err
