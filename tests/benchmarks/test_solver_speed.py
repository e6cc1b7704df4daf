"""The timing of the solver, on a layer 16 times smaller than Mixtral's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.offline import solver_speed


def test_rows_hold_parts_and_what_they_add_up_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(solver_speed, "CONFIG", {"num_local_experts": 1, "num_experts_per_tok": 1})
    out = tmp_path / "speed.json"
    options = "--method milo --rounds 1 --scale 16 --device cpu --repeats 2"
    arguments = ["-o", str(out), *options.split()]
    monkeypatch.setattr(sys, "argv", ["solver_speed.py", *arguments, "--settings", "hqq", "s1", "balanced"])
    solver_speed.main()
    hqq, fixed, balanced = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["calibration"] for row in (hqq, fixed, balanced)] == ["none", "weights", "weights"]
    for row in (hqq, fixed, balanced):
        leaves = sorted(", ".join(row["parts"]).split(", "))
        assert leaves == ["k_proj", "o_proj", "q_proj", "v_proj", "w1", "w2", "w3"]
        parts = sum(part["seconds"] for part in row["parts"].values())
        assert row["layer_seconds"] == pytest.approx(parts + row["allocation_seconds"])
        assert row["model_seconds"] == pytest.approx(32 * row["layer_seconds"])
    assert fixed["parts"]["o_proj"]["ranks"] == 32  # 512 of 4096
    assert fixed["parts"]["o_proj"]["errors"] < hqq["parts"]["o_proj, q_proj"]["errors"]
    assert balanced["allocation_seconds"] > 0
    assert sum(part["ranks"] for part in balanced["parts"].values()) > 0
