"""The table of KL divergences: GPTQ beside rounding to nearest, on the bundled model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import TEXT, make_model

from benchmarks import divergence, streamed_gptq
from benchmarks.accuracy.gptq import Gptq
from vllm_milo.offline.source.reader import ModelReader


def test_gptq_beats_rounding_to_nearest_in_the_table(
    bundled_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(streamed_gptq, "CPU_WINDOWS", 16)
    arguments = [str(bundled_model), "--text", str(TEXT), "-o", str(tmp_path), "--max-windows", "4", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["divergence", *arguments, "--only", "RTN g64", "GPTQ g64", "GPTQ g32"])
    divergence.main()
    rows = {row["name"]: row for row in json.loads((tmp_path / "divergence.json").read_text())["rows"]}
    assert rows["GPTQ g32"]["mean_kl"] < rows["GPTQ g64"]["mean_kl"] < 0.9 * rows["RTN g64"]["mean_kl"]
    assert rows["GPTQ g64"]["bits"] == 3 + 19 / 64
    assert rows["GPTQ g32"]["bits"] == 3 + 19 / 32
    assert "| GPTQ g32 | 3.594 |" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_the_folder_is_a_whole_model_of_few_values(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, out = make_model(family, tmp_path / "source"), tmp_path / "out"
    monkeypatch.setattr(streamed_gptq, "calibration_windows", lambda *_: torch.randint(0, 256, (2, 64)))
    streamed_gptq.write_gptq(source, out, Gptq(64), torch.device("cpu"))
    mine, theirs = ModelReader(out), ModelReader(source)
    assert {matrix.name for matrix in mine.matrices} == {matrix.name for matrix in theirs.matrices}
    assert mine.dtype == theirs.dtype == torch.bfloat16
    assert mine.config == theirs.config
    for mine_layer, theirs_layer in zip(mine.layers, theirs.layers, strict=True):
        assert mine_layer.others == theirs_layer.others
        original = dict(theirs.load_layer(theirs_layer, torch.device("cpu")))
        for matrix, values in mine.load_layer(mine_layer, torch.device("cpu")):
            assert 0.01 < (values - original[matrix]).norm() / original[matrix].norm() < 0.6
            assert all(group.unique().numel() <= 8 for group in values[:4].unflatten(-1, (-1, 64)).flatten(0, 1))
