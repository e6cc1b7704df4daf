"""Whole conversions: what each took is reported by what it was spent on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.offline import whole_model


@pytest.mark.slow
@pytest.mark.long
def test_a_tiny_model_on_one_and_two_devices(
    bundled_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    command = ["whole_model", "mixtral", "--tokenizer", str(bundled_model), "--folder", str(tmp_path / "scratch")]
    command += ["-o", str(tmp_path / "out.json"), "--layers", "2", "--scale", "16", "--devices", "cpu", "cpu,cpu"]
    monkeypatch.setattr("sys.argv", command)
    whole_model.main()
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["devices"] for row in rows] == ["cpu", "cpu,cpu"]
    for row in rows:
        spent = row["spent"]
        assert 0 < spent["solving"]["cpu"] < 2 * row["seconds"]
        assert 0 < spent["reading"] < row["seconds"]
        assert 0 < spent["writing"] < row["seconds"]
        assert 0 <= spent["waiting_for_jobs"] + spent["waiting_for_the_disk"] < row["seconds"]
        assert row["bytes_written"] < row["source_bytes"]
    assert rows[0]["bytes_written"] == rows[1]["bytes_written"]
    assert "| mixtral | 2 | fast | cpu,cpu |" in capsys.readouterr().out
    assert not list((tmp_path / "scratch").iterdir())
