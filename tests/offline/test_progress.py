"""How far a stage is: on a terminal, elsewhere, and where nothing may be said."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_milo.offline.cli import main
from vllm_milo.offline.effort import Effort
from vllm_milo.offline.progress import Stage, doing, progress_bar, recording, views, within


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_elsewhere_a_line_every_so_often_while_an_item_takes_long(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(views, "EVERY", 0.05)
    seen = []
    for item in progress_bar("ab", "quantize", True):
        seen.append(item)
        time.sleep(0.3)
    assert seen == ["a", "b"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 4
    assert lines[0].startswith("quantize: 0 of 2 layers, 0:00 elapsed")
    assert any(line.startswith("quantize: 1 of 2 layers, ") and line.endswith(" left") for line in lines)
    assert lines[-1].startswith("quantize: 2 of 2 layers, ")
    assert lines[-1].endswith(" elapsed")
    time.sleep(0.2)
    assert not capsys.readouterr().err  # nothing after the end


def test_a_short_stage_has_one_line(capsys):
    assert list(progress_bar([1, 2, 3], "tune", True, unit="step")) == [1, 2, 3]
    assert capsys.readouterr().err == "tune: 3 of 3 steps, 0:00 elapsed\n"


def test_a_stage_that_fails_falls_silent(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(views, "EVERY", 0.02)
    before = threading.active_count()

    def fail() -> None:
        for _ in progress_bar([1, 2], "quantize", True):
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    for _ in range(100):
        if threading.active_count() == before:
            break
        time.sleep(0.02)
    assert threading.active_count() == before
    assert "2 of 2" not in capsys.readouterr().err


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress_bar([1, 2], "quantize", True)) == [1, 2]
    assert "quantize: 100%" in terminal.getvalue()
    assert "2/2 [00:00<00:00" in terminal.getvalue()


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_quiet_is_quiet(monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO]):
    said = stream()
    monkeypatch.setattr(sys, "stderr", said)
    assert list(progress_bar([1, 2], "quantize", False)) == [1, 2]
    assert not said.getvalue()


def test_the_time_left_goes_by_the_size_of_what_is_done():
    stage = Stage("quantize", "layer", [0, 1, 3, 2], now=100.0)
    assert stage.remaining(130.0) is None
    assert stage.line(130.0) == "quantize: 0 of 4 layers, 0:30 elapsed"
    stage.advance(110.0)
    assert stage.remaining(115.0) is None  # what is done was no work to speak of
    stage.advance(120.0)
    assert stage.remaining(120.0) == 20.0 * 5
    assert stage.remaining(150.0) == 20.0 * 5 - 30  # the layer that is worked on has taken half a minute
    assert stage.line(150.0) == "quantize: 2 of 4 layers, 0:50 elapsed, about 1:10 left"
    assert stage.remaining(9000.0) == 0.0
    stage.advance(3720.0)
    assert stage.line(3720.0) == "quantize: 3 of 4 layers, 1:00:20 elapsed, about 30:10 left"
    stage.advance(7300.0)
    assert stage.line(7300.0) == "quantize: 4 of 4 layers, 2:00:00 elapsed"


def test_every_stage_of_a_conversion_says_how_far_it_is(small_model: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr("vllm_milo.offline.calibration.choose.WINDOW", 32)
    monkeypatch.setattr("vllm_milo.offline.effort.CPU_EFFORT", Effort(2, 2, 2))
    options = ["--preset", "best", "--max-rounds", "1", "--calibration", "self", "--device", "cpu"]
    assert main(["quantize", str(small_model), "-o", str(tmp_path / "out"), *options]) == 0
    said = capsys.readouterr().err
    for line in ("write: 3 of 3 parts", "quantize: 3 of 3 layers", "tune: 6 of 6 steps"):
        assert line in said
    assert "Loading weights" not in said  # a bar of transformers
    options += ["--quiet", "--overwrite"]
    assert main(["quantize", str(small_model), "-o", str(tmp_path / "out"), *options]) == 0
    said = capsys.readouterr().err
    assert all(line.startswith("warning: ") for line in said.splitlines())


def test_what_is_worked_on_is_told_with_its_own_time(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(views, "EVERY", 0.05)
    for _ in progress_bar([SimpleNamespace(name="model.layers.0")], "quantize", True):
        doing("solve", "model.layers.0.q_proj")
        time.sleep(0.2)
        for _ in within(range(2), "learn"):
            time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.endswith("elapsed; model.layers.0: solve model.layers.0.q_proj") for line in lines)
    assert any("; model.layers.0: learn 1 of 2 steps, about 0:0" in line for line in lines)
    assert lines[-1].startswith("quantize: 1 of 1 layers")
    assert list(within(range(2), "learn")) == [0, 1]  # no stage runs
    doing("nothing")
    assert not capsys.readouterr().err


def test_a_terminal_shows_what_is_worked_on(monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(views, "REDRAWN", 0.02)
    for _ in progress_bar([SimpleNamespace(name="model.layers.0")], "quantize", True):
        doing("solve", "q_proj")
        time.sleep(0.2)
    assert "model.layers.0: solve q_proj" in terminal.getvalue()


def events(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_log_for_machines(small_model: Path, tmp_path: Path, capsys):
    log, out = tmp_path / "log.jsonl", tmp_path / "a folder"
    options = ["--calibration-windows", "2", "--learn-steps", "1", "--max-rounds", "1", "--device", "cpu", "--quiet"]
    command = ["quantize", str(small_model), "-o", str(out), *options]
    assert main([*command, "--log-json", str(log)]) == 0
    told = events(log)
    assert all(one["time"] >= told[0]["time"] > 1e9 for one in told)
    stages = [one["stage"] for one in told if one["event"] == "begin"]
    assert stages == ["read text", "check weights", "quantize", "finish"]
    assert [one["stage"] for one in told if one["event"] == "end"] == stages
    layers = [one for one in told if one["event"] == "progress" and one["stage"] == "quantize"]
    assert [one["layer"] for one in layers][1:] == [f"model.layers.{index}" for index in range(2)]
    assert layers[-1]["seconds"] > 0
    assert layers[-1]["seconds_left"] == 0
    assert layers[1]["seconds_left"] > 0
    assert next(one for one in told if one["event"] != "begin" and one.get("stage") != "read text")["event"] == "plan"
    summary, said = told[-1], capsys.readouterr()
    assert summary["event"] == "summary"
    assert summary["serve"] == f"vllm serve '{out}' --quantization milo"
    assert summary["serve"] in said.out
    report = json.loads((out / "milo_report.json").read_text(encoding="utf-8"))["matrices"]
    worst = sorted(report, key=lambda name: -report[name]["error"])[:5]
    assert [one["matrix"] for one in summary["worst"]] == worst
    for name in worst:
        assert f"{report[name]['error']:.4f}  rank {report[name]['rank']:<4}  {name}\n" in said.out
    assert "--log-json" not in (out / "README.md").read_text(encoding="utf-8")
    assert "log.jsonl" not in (out / "README.md").read_text(encoding="utf-8")
    assert main([*command, f"--log-json={log}"]) == 1  # the output exists
    assert events(log)[: len(told)] == told
    assert events(log)[-1]["event"] == "error"
    assert events(log)[-1]["message"] in capsys.readouterr().err


def test_a_log_that_cannot_be_written(small_model: Path, tmp_path: Path, capsys):
    log = tmp_path / "none" / "log.jsonl"
    assert main(["quantize", str(small_model), "-o", str(tmp_path / "out"), "--log-json", str(log)]) == 1
    assert (
        f"--log-json {log}: cannot be written: No such file or directory; name another file" in capsys.readouterr().err
    )
    for number, content in enumerate(("# notes\n", '{"model_type": "qwen2_moe"}', '"event"', "[" * 100_000, "\xff")):
        mine = tmp_path / f"{number}.txt"
        mine.write_text(content, encoding="latin-1")
        assert main(["quantize", str(small_model), "-o", str(tmp_path / "out"), "--log-json", str(mine)]) == 1
        assert f"--log-json {mine}: exists and is no such log, so it is kept" in capsys.readouterr().err
        assert mine.read_text(encoding="latin-1") == content
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # that nobody reads
    assert main(["quantize", str(small_model), "-o", str(tmp_path / "out"), "--log-json", str(pipe)]) == 1
    assert f"--log-json {pipe}: cannot be written: No such device or address" in capsys.readouterr().err
    full = Path("/dev/full")
    if full.exists():
        with recording(full):
            assert list(progress_bar([1, 2], "quantize", False)) == [1, 2]
        assert capsys.readouterr().err == "warning: --log-json /dev/full: No space left on device; the log ends here\n"
