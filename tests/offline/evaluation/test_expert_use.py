"""Expert counts: from `milo stats` to the frequency policy, and files of another form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import TEXT

from vllm_milo.offline.cli import main
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.evaluation.expert_use import read_expert_counts


def test_stats_feed_the_frequency_policy(small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    counts = tmp_path / "counts.json"
    arguments = ["stats", str(small_model), "--text", str(TEXT), "-o", str(counts), "--max-windows", "4", "--quiet"]
    assert main(arguments) == 0
    table = read_expert_counts(counts)
    assert len(table) == 2
    assert {sum(row) for row in table.values()} == {4 * 512 * 2}  # windows, tokens, experts a token
    options = ["--ranks", "frequency=16", "--expert-counts", str(counts), "--max-rounds", "1", "--quiet"]
    assert main(["quantize", str(small_model), "-o", str(tmp_path / "out"), *options]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    ranks = json.loads(capsys.readouterr().out)["ranks"]["routed_expert"]
    assert ranks["mean"] == pytest.approx(16, abs=0.7)
    assert ranks["max"] > ranks["min"]


def test_expert_counts_of_another_form(tmp_path: Path):
    (tmp_path / "counts.json").write_text("[1, 2]")
    with pytest.raises(ConversionError, match="no expert_counts; make it with `milo stats"):
        read_expert_counts(tmp_path / "counts.json")


@pytest.mark.parametrize("place", ["config.json", "notes", ".", "none/counts.json"])
def test_counts_replace_nothing_but_counts(small_model: Path, tmp_path: Path, capsys, monkeypatch, place: str):
    monkeypatch.setattr("vllm_milo.offline.cli.stats.load_model", None)  # all this is known before
    config = (small_model / "config.json").read_bytes()
    for name in ("config.json", "notes"):
        (tmp_path / name).write_bytes(config)
    assert main(["stats", str(small_model), "--text", str(TEXT), "-o", str(tmp_path / place), "--quiet"]) == 1
    assert f"milo stats: error: {tmp_path / place}: " in capsys.readouterr().err
    assert (tmp_path / "config.json").read_bytes() == (tmp_path / "notes").read_bytes() == config
