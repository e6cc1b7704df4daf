"""The tuning benchmark with a made-up GPU: records, distances, and what today's heuristic would take by a record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import tune
from benchmarks.kernels.named_models import MODELS, SHIPPED, named_shape
from vllm_milo.kernels import tuned
from vllm_milo.kernels.tuning.search import Result
from vllm_milo.kernels.weights import MoEShape

CPU = torch.device("cpu")
SHAPE = MoEShape(8, 2, 4096, 14336, (128, 128), (640, 320))


def results(shape: MoEShape = SHAPE) -> dict[int, list[Result]]:
    """The heuristic's tiles are best at one token and a fifth behind at 64; one candidate fails."""
    found = {}
    for tokens, times in ((1, (10.0, 12.0)), (64, (12.0, 10.0))):
        first, second = tune.heuristic.heuristic_configs(tokens * shape.top_k, shape, CPU)
        other = (first, second._replace(num_stages=2))
        broken = (first, second._replace(num_stages=5))
        rows = [Result(tiles, time, None) for tiles, time in zip(((first, second), other), times, strict=True)]
        found[tokens] = [*rows, Result(broken, None, "RuntimeError: no room")]
    return found


def test_distances_are_from_the_best_tiles():
    assert tune.distances(results()) == {1: 0.0, 64: pytest.approx(0.2)}
    assert "10.0% longer than the best tiles on average of 2" in tune.summary("mixtral", tune.distances(results()))
    assert "20.0% at worst, at 64 tokens" in tune.summary("mixtral", tune.distances(results()))


def test_a_record_is_written_read_and_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(tune, "named_shape", lambda *arguments: SHAPE)
    monkeypatch.setattr(tune, "tune", lambda shape, *arguments: results(shape))
    monkeypatch.setattr(tune, "about", lambda device: ABOUT)
    record = tmp_path / "record.json"
    tune.main(["mixtral", "-o", str(tmp_path / "tuned"), "--record", str(record), "--device", "cpu"])
    (path,) = (tmp_path / "tuned").iterdir()
    assert path.name == tuned.make_key(SHAPE, "Some GPU", torch.bfloat16).file_name
    assert tuned.read_file(path)[64] == results()[64][1].tiles
    held = json.loads(record.read_text())["models"]["mixtral"]
    assert tune.read_record(held) == (SHAPE, results())
    assert held["tokens"]["64"]["heuristic_microseconds"] == 12.0
    assert held["tokens"]["64"]["tuned_microseconds"] == 10.0
    capsys.readouterr()
    tune.main(["--replay", str(record)])
    replayed = capsys.readouterr().out
    assert "at 64 tokens" in replayed
    assert "64 tokens: +20.0%" in replayed
    # a heuristic that changes: once to tiles with a time, once to others
    choices = {2: results()[1][1].tiles, 128: results()[64][2].tiles}
    monkeypatch.setattr(tune.heuristic, "heuristic_configs", lambda pairs, shape, device: choices[pairs])
    changed = tune.replay(json.loads(record.read_text()))
    assert "  1 tokens: +20.0%" in changed
    assert "  not timed: 64 tokens" in changed


ABOUT = {
    "device": "Some GPU",
    "triton": "3.6.0",
    "multiprocessors": tune.launch.processors(CPU),
    "shared_memory": tune.launch.shared_memory(CPU),
    "bandwidth": tune.launch.bandwidth(CPU),
}


def test_named_models_are_planned_by_the_converter():
    shape = named_shape("olmoe")
    assert (shape.experts, shape.top_k, shape.hidden, shape.intermediate) == (64, 8, 2048, 1024)
    assert all(rank > 0 for rank in shape.ranks)
    assert set(SHIPPED) < set(MODELS)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["mixtrel"], "unknown mixtrel: choose from mixtral"),
        ([], "give names of models, or --replay"),
        (["mixtral", "--replay", "x.json"], "give names of models, or --replay"),
    ],
)
def test_unknown_words_are_refused(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        tune.main(words)
    assert reason in capsys.readouterr().err
