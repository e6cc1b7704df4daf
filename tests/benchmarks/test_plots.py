"""The README's plots, and what is said where matplotlib is missing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks import plots

ROOT = Path(__file__).resolve().parent.parent.parent
TURN = {"turn": 0, "load": [128, 128], "tpot": 9.0, "ttft": 50.0}
TRAFFIC = {
    "model": "mixtral",
    "layers": 32,
    "environment": {"vllm": "0.33.0", "device": "a card"},
    "turns": [
        TURN | {"contender": name, "concurrency": count, "tokens_per_second": 90.0 * count}
        for name in ("milo", "bf16")
        for count in (1, 16)
    ],
}


@pytest.mark.parametrize("kind", plots.KINDS)
def test_plots_are_written(kind: str, tmp_path: Path):
    source = ROOT / "benchmarks" / "results" / "real-weights-qwen2-0.5b-h200.json"
    if kind == "traffic":
        source = tmp_path / "traffic.json"
        source.write_text(json.dumps(TRAFFIC))
    words = [kind, str(source), "-o", str(tmp_path / "new" / "plot.png")]
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(ImportError, match=r"pip install 'vllm-milo\[bench\]'"):
            plots.main(words)
        return
    plots.main(words)
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")
