"""The README's plots, and what is said where matplotlib is missing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plots

ROOT = Path(__file__).resolve().parent.parent.parent
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


def made_up() -> dict[str, Any]:
    """A record as the benchmark of traffic writes it. MADE UP: none of these figures was measured."""
    turns = [
        {"contender": name, "turn": turn, "load": load, "concurrency": count, "tpot": 9.0, "ttft": 50.0}
        | {"tokens_per_second": factor * count * (turn + 1)}
        for load in ([1024, 256], [1024, 2], [128, 128])
        for turn in range(3)
        for count in (16, 1)
        for name, factor in (("milo", 90.0), ("milo-small", 95.0), ("bf16", 60.0))
    ]
    environment = {"vllm": "0.0", "device": "no device, made-up figures"}
    return {"model": "mixtral", "layers": 2, "environment": environment, "turns": turns}


@pytest.mark.parametrize("kind", plots.KINDS)
def test_plots_are_written(kind: str, tmp_path: Path):
    source = ROOT / "benchmarks" / "results" / "real-weights-qwen2-0.5b-h200.json"
    if kind == "traffic":
        source = tmp_path / "traffic.json"
        source.write_text(json.dumps(made_up()))
    words = [kind, str(source), "-o", str(tmp_path / "new" / "plot.png")]
    if not HAS_MATPLOTLIB:
        with pytest.raises(ImportError, match=r"pip install 'vllm-milo\[bench\]'"):
            plots.main(words)
        return
    plots.main(words)
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="needs matplotlib: pip install 'vllm-milo[bench]'")
def test_throughput_is_the_median_of_turns_by_load_and_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    plots.draw_traffic(made_up(), tmp_path / "plot.png")
    (figure,) = drawn
    assert [axes.get_title() for axes in figure.axes] == ["128 tokens in, 128 out", "1024 tokens in, 256 out"]
    for axes in figure.axes:
        found = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
        assert found == {
            "milo": ([1, 16], [180, 180 * 16]),
            "milo-small": ([1, 16], [190, 190 * 16]),
            "bf16": ([1, 16], [120, 120 * 16]),
        }
        bands = [band.get_datalim(axes.transData).intervaly.tolist() for band in axes.collections]
        assert bands[0] == [90, 270 * 16]  # the least and the largest turn
    assert "no device, made-up figures" in figure.get_suptitle()


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="needs matplotlib: pip install 'vllm-milo[bench]'")
def test_a_run_that_was_cut_off_is_drawn_as_far_as_it_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    record = made_up()
    record["turns"] = [row for row in record["turns"] if row["load"] == [128, 128] or row["contender"] == "milo"]
    plots.draw_traffic(record, tmp_path / "plot.png")
    assert [len(axes.get_lines()) for axes in drawn[0].axes] == [3, 1]


def test_no_two_contenders_look_alike():
    colors = plots.contender_colors(["bf16", "milo", "marlin-int4-g128", "milo-small", "milo-s1"])
    assert len({*colors.values()}) == 5
    assert {colors[name] for name in ("milo", "milo-small", "milo-s1")} < {*plots.OUR_COLORS}


def test_one_of_several_records_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: list[Any] = []
    monkeypatch.setitem(plots.KINDS, "traffic", lambda record, _: drawn.append(record))
    source = tmp_path / "runs.json"
    runs = [made_up(), made_up() | {"model": "qwen3"}]
    source.write_text(json.dumps({"runs": runs}))
    words = ["traffic", str(source), "-o", str(tmp_path / "plot.png")]
    plots.main([*words, "--model", "qwen3"])
    assert drawn == [runs[1]]
    for wrong in ([], ["--model", "none"]):
        with pytest.raises(SystemExit, match="has records of mixtral, qwen3; name one of them with --model"):
            plots.main([*words, *wrong])
