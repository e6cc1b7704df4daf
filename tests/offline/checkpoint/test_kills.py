"""The real command is killed at random moments, again and again; what comes of it is what comes of one run."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_milo.offline.cli import main
from vllm_milo.offline.durable import publication

OPTIONS = {
    "plain": ["--calibration", "none"],
    "calibrated": ["--calibration-windows", "6", "--learn-steps", "4"],
    "best": ["--preset", "best", "--calibration-windows", "4", "--learn-steps", "2", "--max-rounds", "1"],
}


def command(model: Path, out: Path, how: str) -> list[str]:
    call = [sys.executable, "-m", "vllm_milo.offline.cli", "quantize", str(model), "-o", str(out)]
    return [*call, "--device", "cpu", *OPTIONS[how]]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


class Run:
    """A run with --resume: ``said`` is the note that it begins with, when the imports are over."""

    def __init__(self, call: list[str]) -> None:
        self._process = subprocess.Popen(
            [*call, "--resume"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        assert self._process.stderr is not None
        self.said = self._process.stderr.readline()
        self._start = time.monotonic()

    def kill_after(self, seconds: float) -> bool:
        """Kill the process after some time; return whether it was still there."""
        try:
            _, said = self._process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGKILL)
            self._process.communicate()
            return True
        assert self._process.returncode == 0, self.said + said
        return False

    def finish(self) -> float:
        """Wait for the end; return the seconds since the imports."""
        assert not self.kill_after(600)
        return time.monotonic() - self._start


def check(how: str, model: Path, folder: Path, kills: int) -> None:
    """Convert again and again, and kill each conversion a few times, until there were enough kills."""
    whole = Run(command(model, folder / "whole", how)).finish()
    moments = random.Random(0)
    killed = resumed = conversions = 0
    while killed < kills:
        assert conversions < 4 * kills, "runs end before they are killed"
        out = folder / f"out-{conversions}"
        call = command(model, out, how)
        for _ in range(min(4, kills - killed)):
            if out.exists():  # it was killed after that
                break
            run = Run(call)
            resumed += "going on after" in run.said
            killed += run.kill_after(whole * moments.uniform(0.1, 0.9))
        if not out.exists():
            run = Run(call)
            resumed += "going on after" in run.said
            run.finish()
        assert hashes(out) == hashes(folder / "whole")
        conversions += 1
    print(f"{how}: {killed} kills in {conversions} conversions; {resumed} runs went on with layers; one: {whole:.1f} s")


def test_two_kills(small_model: Path, tmp_path: Path):
    check("calibrated", small_model, tmp_path, 2)


KILLS = {"plain": 20, "calibrated": 8, "best": 4}
"""Conversions with a text take several times as long; MILO_KILLS in the environment sets another number for all."""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("how", OPTIONS)
def test_many_kills(how: str, small_model: Path, tmp_path: Path):
    check(how, small_model, tmp_path, int(os.environ.get("MILO_KILLS", KILLS[how])))


CHANGES = ("fsync", "replace", "rename", "link", "unlink", "rmdir")


def run_until(number: int, arguments: list[str], exchange: bool, count: Path) -> int:
    """Run the command in a copy of this process that kills itself before its ``number``-th change of the disk.

    Returns:
        Its exit status, negative for a signal; ``count`` then holds how many changes it made if it ended by itself.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    calls = 0

    def killing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    for name in CHANGES:
        setattr(os, name, killing(getattr(os, name)))
    publication.exchange = killing(publication.exchange) if exchange else lambda *_: False
    status = 1
    try:
        status = main(arguments)
        count.write_text(str(calls))
    finally:
        os._exit(status)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_before_each_change_of_the_disk(exchange: bool, sources: dict[str, Path], tmp_path: Path):
    """With an old checkpoint that is replaced: at each moment the old or the new one is there, or comes back."""
    work, count = tmp_path / "work", tmp_path / "count"
    work.mkdir()
    out = work / "out"
    always = ["quantize", str(sources["mixtral"]), "-o", str(out), "--quiet", "--device", "cpu", "--max-rounds", "1"]
    always += ["--calibration", "none", "--overwrite"]
    assert run_until(0, [*always, "--seed", "1", "--ranks", "uniform=8"], exchange, count) == 0
    old = hashes(Path(shutil.copytree(out, tmp_path / "old")))
    assert run_until(0, always, exchange, count) == 0
    new, changes, absent = hashes(out), int(count.read_text()), 0
    assert old != new
    for number in range(1, changes + 1):
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "old", out)
        assert run_until(number, always, exchange, count) == -signal.SIGKILL, number
        if out.exists():
            assert hashes(out) in (old, new), number
        else:
            absent += 1
        assert run_until(0, [*always, "--resume"], exchange, count) == 0, number
        assert hashes(out) == new
        assert [path.name for path in work.iterdir()] == ["out"], number
    print(f"exchange {exchange}: {changes} kills; {absent} left nothing at the output until the next run")
    assert absent == (0 if exchange else 1)
