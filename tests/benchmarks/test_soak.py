"""The soak: what it says of answers, memory and ends, what it leaves when it is cut off, and one of a real server."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from benchmarks.records import write_text
from benchmarks.serving import soak as soaks
from benchmarks.serving.server import Server
from benchmarks.serving.soak import load_beside, load_seconds, main, make_requests, soak
from benchmarks.serving.soaking import requests as clients
from benchmarks.serving.soaking.processes import Sample
from benchmarks.serving.soaking.record import Record
from benchmarks.serving.soaking.report import (
    Stage,
    find_notes,
    find_problems,
    format_report,
    missing_stages,
    summarize_memory,
)
from benchmarks.serving.soaking.requests import ANSWER, DISCONNECT, STREAM, Answer, Outcome, Request, run
from benchmarks.serving.soaking.tally import Tally, compare, first_difference

QUIET = Answer([5, 6, 7], [{5: -0.1, 9: -3.0}, {6: -0.7, 8: -0.72}, {7: -0.2, 4: -2.0}])


def test_first_differences():
    assert first_difference(QUIET, QUIET) is None
    place, gap = first_difference(QUIET, Answer([5, 8, 1], []))
    assert (place, gap) == (1, pytest.approx(0.02))
    assert first_difference(QUIET, Answer([3, 6, 7], [])) == (0, float("inf"))
    assert first_difference(QUIET, Answer([5, 6], [])) == (2, float("inf"))


def test_near_ties_are_told_from_other_differences():
    answered = [(0, QUIET), (0, Answer([5, 8, 1], [])), (0, Answer([5, 6, 4], []))]
    found = compare([QUIET], answered, near=0.1)
    assert (found["answers"], found["exact"], found["near_ties"], found["other"]) == (3, 1, 1, 1)
    assert found["near_tie_share"] == 0.5
    assert found["largest_gap"] == pytest.approx(1.8)
    assert compare([QUIET], [(0, QUIET)], near=0.1)["near_tie_share"] is None


def test_outcomes_are_counted_as_they_come():
    tally = Tally([QUIET], near=0.1)
    assert tally.summary()["requests"]["median_seconds"] is None
    for outcome in (
        Outcome(ANSWER, 0, QUIET, None, 1.0),
        Outcome(STREAM, 0, Answer([5, 8, 1], []), None, 3.0),
        Outcome(DISCONNECT, 0, None, None, 9.0),
        Outcome(ANSWER, 0, None, "ReadError: ", 9.0),
    ):
        tally.add(outcome)
    found = tally.summary()
    assert found["requests"] == {
        "all": 4,
        "by_kind": {ANSWER: 2, STREAM: 1, DISCONNECT: 1},
        "left_by_clients": 1,
        "failed": 1,
        "errors": {"ReadError: ": 1},
        "median_seconds": 2.0,
        "longest_seconds": 3.0,
    }
    assert (found["load"]["answers"], found["load"]["exact"], found["load"]["near_ties"]) == (2, 1, 1)


def test_memory_that_grows():
    samples = [Sample(5.0 * number, 100 + 10 * number, None) for number in range(10)]
    found = summarize_memory(samples)
    assert found["host"] == {"early": 125, "late": 185, "peak": 190, "growth": 60}
    assert "device" not in found
    assert summarize_memory([Sample(0.0, 1, 2)])["device"]["growth"] == 0
    assert "host" not in summarize_memory([])


def test_a_sample_without_the_device_hides_no_growth():
    samples = [Sample(5.0 * number, 100, None if number == 4 else 100 + number) for number in range(11)]
    assert summarize_memory(samples)["device"] == {"early": 102, "late": 109, "peak": 110, "growth": 7}


def test_few_samples_are_kept_in_their_order():
    found = summarize_memory([Sample(5.0 * number, number, number + 1) for number in range(300)])
    seconds, host, device = (found["series"][name] for name in ("seconds", "host", "device"))
    assert found["samples"] == 300
    assert len(seconds) == len(host) == len(device) == 120
    assert (seconds[0], seconds[-1]) == (0, 5 * 299)
    assert all(5 <= after - before <= 15 for before, after in itertools.pairwise(seconds))
    assert host == [second / 5 for second in seconds]
    assert len(summarize_memory([Sample(0.0, 1, 2)] * 7)["series"]["host"]) == 7


def test_the_report_shows_memory_at_quarters_of_the_load():
    record = good_record()
    record["memory"] = summarize_memory([Sample(15.0 * at, 2**20 * at, None) for at in range(101)])
    report = format_report(record)
    assert "| MiB at | 0 s | 375 s | 750 s | 1125 s | 1500 s |" in report
    assert "| host | 0 | 25 | 50 | 75 | 100 |" in report
    assert "| device |" not in report


@pytest.mark.parametrize(
    ("until", "gone", "quiet", "seconds"),
    [
        (None, 300, 40, 1500),
        (2000, 300, 40, 1500),  # the minutes are the most
        (1700, 300, 40, 1700 - 300 - 60 - 15),
        (300, 200, 80, 0),
    ],
)
def test_the_load_leaves_time_for_what_comes_after_it(until: float | None, gone: float, quiet: float, seconds: float):
    assert load_seconds(25, until, gone, quiet) == seconds


def test_no_wave_begins_that_would_end_too_late(monkeypatch: pytest.MonkeyPatch):
    noted = []

    async def behave(http: httpx.AsyncClient, request: Request, kind: str, patience: float) -> Answer:
        await asyncio.sleep(0.4)
        return QUIET

    monkeypatch.setattr(clients, "_behave", behave)
    start = time.monotonic()
    asyncio.run(run("http://localhost", [Request([1], 1)], seconds=1.1, peak=8, seed=0, note=noted.append))
    assert 0.8 <= time.monotonic() - start < 1.1
    assert [outcome.answer for outcome in noted] == [QUIET] * 16


def good_record() -> dict:
    phase = compare([QUIET], [(0, QUIET)], near=0.1)
    return {
        "model": "m",
        "stage": Stage.KILL,
        "minutes": 1.0,
        "peak": 8,
        "largest_growth": {"host": 0.1, "device": 0.01},
        "quiet": {"answers": 1, "seconds": 0.5},
        "load": phase,
        "after": phase,
        "requests": {"all": 1, "left_by_clients": 0, "failed": 0, "errors": {}}
        | {"median_seconds": 0.1, "longest_seconds": 0.1},
        "memory": summarize_memory([Sample(0.0, 100, 1000)]),
        "left": {"vllm:num_requests_running": 0.0},
        "kill": {"requests": 8, "errors": 8, "answered": 0, "hanging": 0, "error": "e", "status": 1, "seconds": 2.0},
        "problems": [],
        "notes": [],
    }


BROKEN = {
    "requests failed": lambda record: record["requests"].update(failed=2),
    "differ where there was no near tie": lambda record: record.update(
        load=compare([QUIET], [(0, Answer([1], []))], near=0.1)
    ),
    "no client got an answer": lambda record: record.update(load=compare([QUIET], [], near=0.1)),
    "num_requests_running stays at 3": lambda record: record["left"].update({"vllm:num_requests_running": 3.0}),
    "host's memory grew from 100 to 111": lambda record: record["memory"]["host"].update(growth=11, late=111),
    "device's memory grew from 1000 to 1011": lambda record: record["memory"]["device"].update(growth=11, late=1011),
    "2 requests got no end": lambda record: record["kill"].update(hanging=2),
    "no request ended in an error": lambda record: record["kill"].update(errors=0),
    "the server goes on": lambda record: record["kill"].update(status=None),
}


@pytest.mark.parametrize("message", BROKEN)
def test_each_problem_is_named(message: str):
    record = good_record()
    assert find_problems(record) == []
    BROKEN[message](record)
    assert any(message in problem for problem in find_problems(record))
    assert "| under load |" in format_report(record)


def answers(number: int, other: int) -> dict:
    found = compare([QUIET], [(0, Answer([5, 6, 4], []))] * other + [(0, QUIET)] * (number - other), near=0.1)
    assert (found["answers"], found["other"]) == (number, other)
    return found


@pytest.mark.parametrize(
    ("number", "other", "most"),
    [(100, 20, 30 + 2 * 21**0.5), (10000, 2000, 3000 + 2 * 2100**0.5), (100, 0, 0), (100, 90, 100)],
)
def test_answers_may_differ_as_those_of_the_model_in_16_bits_do(number: int, other: int, most: float):
    record = good_record() | {"beside": answers(number, other)}
    record["load"] = answers(number, int(most))
    assert find_problems(record) == []
    assert f"| 16 bits, under load | {number:.4g} |" in format_report(record)
    if most < number:
        record["load"] = answers(number, int(most) + 1)
        (problem,) = find_problems(record)
        assert f"of the model in 16 bits {other} of {number} under load" in problem
    assert find_problems(record | {"beside": answers(0, 0), "load": answers(3, 1)})


def test_gaps_are_counted():
    found = compare([QUIET], [(0, QUIET), *[(0, Answer([5, 8, 1], []))] * 2, (0, Answer([5, 6, 4], []))], near=0.1)
    assert found["gaps"] == {"0.02": 2, "1.80": 1}
    assert compare([QUIET], [(0, Answer([5, 8, 1], []))], near=0.0195)["near_ties"] == 1  # printed numbers are rounded


def test_a_record_beside_must_fit(tmp_path: Path):
    file = tmp_path / "16.json"
    good = {"benchmark": "soak", "model": "m", "minutes": 3.0, "near": 0.1, "load": answers(4, 1)}
    file.write_text(json.dumps(good), encoding="utf-8")
    assert load_beside(file, 0.1) == {"model": "m", "minutes": 3.0, **good["load"]}
    with pytest.raises(SystemExit, match=r"16\.json: .*near ties are of 0.1 nats, not 0.2"):
        load_beside(file, 0.2)
    for broken, message in (
        (json.dumps(good | {"benchmark": "load"}), "it is one of load"),
        (json.dumps({name: value for name, value in good.items() if name != "load"}), "load"),
        ("[]", "no record"),
        ("{", "no record"),
    ):
        file.write_text(broken, encoding="utf-8")
        with pytest.raises(SystemExit, match=message):
            load_beside(file, 0.1)
    with pytest.raises(SystemExit, match="no record"):
        load_beside(tmp_path / "none.json", 0.1)


def test_memory_may_grow_by_its_part():
    record = good_record()
    record["memory"]["host"].update(growth=10, late=110)
    record["memory"]["device"].update(growth=10, late=1010)
    assert find_problems(record) == []
    record["largest_growth"] = {"host": 0.09, "device": 0.009}
    assert len(find_problems(record)) == 2


class Cut(Exception):
    """The machine is taken away."""


class Parts:
    """Stand for what a soak asks of a server, up to the stage after which the machine is taken away."""

    def __init__(self, last: Stage) -> None:
        self.last, self.asked, self.seconds = last, False, 0.0

    def cut(self, done: Stage) -> None:
        if done is self.last:
            raise Cut

    async def answer_all(self, *_) -> list[Answer]:
        if self.asked:
            self.cut(Stage.IDLE)
        self.asked = True
        return [QUIET]

    async def run(self, url, requests, seconds, peak, seed, note) -> None:
        self.cut(Stage.QUIET)
        self.seconds = seconds
        note(Outcome(ANSWER, 0, QUIET, None, 1.0))
        await asyncio.sleep(0.3)
        self.cut(Stage.PART)
        note(Outcome(STREAM, 0, QUIET, None, 1.0))

    def idle_gauges(self, *_) -> dict:
        self.cut(Stage.LOAD)
        return good_record()["left"]

    async def kill_under_load(self, *_) -> dict:
        self.cut(Stage.AFTER)
        return good_record()["kill"]


def soak_parts(last: Stage, output: Path, monkeypatch: pytest.MonkeyPatch) -> Parts:
    """Run a soak of what stands for a server until the machine is taken away."""
    parts = Parts(last)
    for name in ("answer_all", "run", "idle_gauges", "kill_under_load"):
        monkeypatch.setattr(soaks, name, getattr(parts, name))
    monkeypatch.setattr(soaks, "WRITE_SECONDS", 0.1)
    monkeypatch.setattr(soaks, "process_seconds", lambda: 100.0)
    arguments = Namespace(minutes=25, until=200, peak=8, seed=0, near=0.1, longest=64, sample_seconds=0.05)
    arguments.exit_seconds = 1
    known = {name: good_record()[name] for name in ("model", "peak", "largest_growth")} | {"minutes": 0.0}
    server = Server("http://localhost", SimpleNamespace(pid=os.getpid()))
    soak(server, [Request([1] * 9, 4)], arguments, Record(output, known))
    return parts


SINCE = {
    "quiet": Stage.QUIET,
    "requests": Stage.PART,
    "load": Stage.PART,
    "memory": Stage.PART,
    "left": Stage.IDLE,
    "after": Stage.AFTER,
    "kill": Stage.KILL,
}
"""From which stage on a record has what."""


@pytest.mark.parametrize("last", [stage for stage in Stage if stage is not Stage.KILL])
def test_a_soak_that_is_cut_off_leaves_what_it_found(last: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(Cut):
        soak_parts(last, tmp_path / "soak.json", monkeypatch)
    record, report = json.loads((tmp_path / "soak.json").read_text()), (tmp_path / "soak.md").read_text()
    stages = list(Stage)
    assert record["stage"] == last
    assert set(SINCE) & set(record) == {name for name in SINCE if stages.index(SINCE[name]) <= stages.index(last)}
    assert record["problems"] == []
    if "requests" in record:
        assert record["requests"]["all"] == record["load"]["exact"] == (1 if last is Stage.PART else 2)
        assert 0.1 <= 60 * record["minutes"] < 2
    after = [stage for stage in stages[stages.index(last) + 1 :] if stage is not Stage.PART]
    assert missing_stages(record) == after
    assert f"Unfinished, the last is: {last}. Missing: {', '.join(after)}." in report
    assert "Problems so far: none" in report
    assert ("| under load |" in report) == ("load" in record)
    assert ("| quiet again |" in report) == ("after" in record)
    assert "Killed" not in report


def test_a_soak_that_is_not_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parts = soak_parts(Stage.KILL, tmp_path / "soak.json", monkeypatch)
    record, report = json.loads((tmp_path / "soak.json").read_text()), (tmp_path / "soak.md").read_text()
    assert record["stage"] == Stage.KILL
    assert set(SINCE) <= set(record)
    assert 84 < parts.seconds <= 85  # of 200, 100 of which are gone, the kill is given 15
    assert "Unfinished" not in report
    assert "Problems: none" in report
    assert {path.name for path in tmp_path.iterdir()} == {"soak.json", "soak.md"}


def test_an_unfinished_record_names_its_problems():
    record = good_record() | {"stage": Stage.PART}
    for name in ("left", "after", "kill"):
        del record[name]
    record["memory"]["device"].update(growth=11, late=1011)
    record["requests"].update(failed=2)
    record["problems"] = find_problems(record)
    assert len(record["problems"]) == 2
    assert "Problems so far: 2 requests failed" in format_report(record)


def test_the_title_says_how_long_the_load_was():
    assert format_report(good_record() | {"minutes": 23.456}).startswith("Soak of m, 23.5 minutes, up to 8 requests")


def test_a_file_that_is_not_written_leaves_the_last_one(tmp_path: Path):
    path = tmp_path / "record.json"
    write_text(path, "old")
    (tmp_path / "record.json.partial").mkdir()  # the disk is full
    with pytest.raises(OSError, match="partial"):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_a_server_that_ends_with_status_0_is_noted():
    record = good_record()
    assert find_notes(record) == []
    record["kill"]["status"] = 0
    assert find_problems(record) == []
    assert "supervisors must restart it" in find_notes(record)[0]


def test_requests_are_of_mixed_lengths(bundled_model: Path):
    text = Path(__file__).parent.parent / "assets" / "valid.txt"
    requests = make_requests(bundled_model, text, 256, 100, seed=0)
    lengths = [len(request.prompt) for request in requests]
    assert min(lengths) < 8
    assert max(lengths) > 128
    assert all(len(request.prompt) + request.max_tokens <= 256 for request in requests)
    assert make_requests(bundled_model, text, 256, 100, seed=0) == requests


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_a_short_soak(checkpoints: dict[str, Path], tmp_path: Path):
    """In float32, where batches tip no near tie."""
    output = tmp_path / "soak.json"
    words = [str(checkpoints["bundled"]), "-o", str(output), "--minutes", "0.1", "--peak", "24", "--prompts", "6"]
    words += ["--longest", "96", "--sample-seconds", "0.5", "--log", str(tmp_path / "server.log")]
    status = main([*words, "--", "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16"])
    record = json.loads(output.read_text())
    assert record["problems"] == []
    assert status == 0
    assert record["load"]["exact"] == record["load"]["answers"] > 0
    assert record["requests"]["left_by_clients"] > 0
    assert record["stage"] == Stage.KILL
    assert record["minutes"] > 0
    assert record["memory"]["samples"] == len(record["memory"]["series"]["host"]) > 1
    assert record["kill"]["status"] is not None
    assert record["kill"]["errors"] > 0
    assert "Problems: none" in output.with_suffix(".md").read_text()
