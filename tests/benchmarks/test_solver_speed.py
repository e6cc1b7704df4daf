"""The timing of the solver, on a layer 16 times smaller than Mixtral's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.offline import solver_speed


@pytest.mark.parametrize("method", ["milo", "paper"])
def test_rows_hold_parts_and_what_they_add_up_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str):
    monkeypatch.setattr(solver_speed, "EXPERTS", 1)
    out = tmp_path / "speed.json"
    options = f"--method {method} --rounds 1 --scale 16 --device cpu --repeats 2 --settings hqq s1 fast"
    monkeypatch.setattr(sys, "argv", ["solver_speed.py", "-o", str(out), *options.split()])
    solver_speed.main()
    hqq, fixed, fast = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["method"] for row in (hqq, fixed, fast)] == ["hqq", method, method]
    for row in (hqq, fixed, fast):
        leaves = sorted({leaf for part in row["parts"] for leaf in part.split(", ")})
        assert leaves == ["k_proj", "o_proj", "q_proj", "v_proj", "w1", "w2", "w3"]
        parts = sum(part["seconds"] for part in row["parts"].values())
        assert row["layer_seconds"] == pytest.approx(parts)
        assert row["model_seconds"] == pytest.approx(32 * row["layer_seconds"])
    (attention,) = (part for name, part in fixed["parts"].items() if "o_proj" in name)
    (plain,) = (part for name, part in hqq["parts"].items() if "o_proj" in name)
    assert attention["ranks"] == 32  # 512 of 4096
    assert attention["errors"] < plain["errors"]
    # by role: most for attention, of which keys and values are the cheapest
    ranks = {name: part["ranks"] for name, part in fast["parts"].items()}
    routed = {name for name in ranks if name.startswith("w")}
    assert min(ranks[name] for name in ranks.keys() - routed) > max(ranks[name] for name in routed)
