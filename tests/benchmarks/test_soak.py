"""The soak: what it says of answers, memory and ends, and a short one of a real server."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.serving.soak import main, make_requests
from benchmarks.serving.soaking.processes import Sample, Sampler, members
from benchmarks.serving.soaking.report import (
    compare,
    find_notes,
    find_problems,
    first_difference,
    format_report,
    summarize_memory,
)
from benchmarks.serving.soaking.requests import Answer

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


def test_memory_that_grows():
    samples = [Sample(100 + 10 * number, None) for number in range(10)]
    found = summarize_memory(samples)
    assert found["host"] == {"early": 125, "late": 185, "peak": 190, "growth": 60}
    assert "device" not in found
    assert summarize_memory([Sample(1, 2)])["device"]["growth"] == 0


def test_processes_of_a_session():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, start_new_session=True)
    try:
        deadline = time.monotonic() + 30
        while len(found := members(process.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.pid in found
        assert len(found) == 2
        assert all(held > 2**20 for held in found.values())
        with Sampler(process.pid, 0.01) as sampler:
            time.sleep(0.1)
        assert all(sample.host > 2**21 for sample in sampler.samples)
    finally:
        process.communicate(b"\n", timeout=30)
    assert not members(process.pid)


def good_record() -> dict:
    phase = compare([QUIET], [(0, QUIET)], near=0.1)
    return {
        "model": "m",
        "minutes": 1.0,
        "peak": 8,
        "load": phase,
        "after": phase,
        "requests": {"all": 1, "left_by_clients": 0, "failed": 0, "errors": {}}
        | {"median_seconds": 0.1, "longest_seconds": 0.1},
        "memory": summarize_memory([Sample(100, 7)]),
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
    "host's memory grew from 100 to 150": lambda record: record["memory"]["host"].update(growth=50, late=150),
    "2 requests got no end": lambda record: record["kill"].update(hanging=2),
    "no request ended in an error": lambda record: record["kill"].update(errors=0),
    "the server goes on": lambda record: record["kill"].update(status=None),
}


@pytest.mark.parametrize("message", BROKEN)
def test_each_problem_is_named(message: str):
    record = good_record()
    assert find_problems(record, largest_growth=0.1) == []
    BROKEN[message](record)
    assert any(message in problem for problem in find_problems(record, largest_growth=0.1))
    assert "| under load |" in format_report(record)


def test_a_server_that_ends_with_status_0_is_noted():
    record = good_record()
    assert find_notes(record) == []
    record["kill"]["status"] = 0
    assert find_problems(record, largest_growth=0.1) == []
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
    assert record["memory"]["samples"] > 1
    assert record["kill"]["status"] is not None
    assert record["kill"]["errors"] > 0
    assert "Problems: none" in output.with_suffix(".md").read_text()
