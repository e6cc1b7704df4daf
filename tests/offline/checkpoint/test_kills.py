"""The real command is killed at random moments, again and again; what comes of it is what comes of one run."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

OPTIONS = {
    "plain": ["--calibration", "none"],
    "calibrated": ["--calibration-windows", "6", "--learn-steps", "4"],
    "best": ["--preset", "best", "--calibration-windows", "4", "--learn-steps", "2", "--max-rounds", "1"],
}


def command(model: Path, out: Path, how: str) -> list[str]:
    call = [sys.executable, "-m", "vllm_milo.offline.cli", "quantize", str(model), "-o", str(out), "--quiet"]
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


@pytest.mark.parametrize("how", ["calibrated"])
def test_three_kills(how: str, bundled_model: Path, tmp_path: Path):
    check(how, bundled_model, tmp_path, 3)


@pytest.mark.slow
@pytest.mark.parametrize("how", OPTIONS)
def test_twenty_kills(how: str, bundled_model: Path, tmp_path: Path):
    check(how, bundled_model, tmp_path, 20)


_KILLED_AT = """
import os, signal, sys
from vllm_milo.offline.cli import main
calls = 0
def killing(real):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return call
for name in ("fsync", "replace", "rename", "unlink", "rmdir"):
    setattr(os, name, killing(getattr(os, name)))
if sys.argv[2] == "without-exchange":
    from vllm_milo.offline.durable import publication
    publication.exchange = lambda *_: False
else:
    from vllm_milo.offline.durable import publication
    publication.exchange = killing(publication.exchange)
status = main(sys.argv[3:])
print(calls)
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["exchange", "without-exchange"])
def test_a_kill_before_each_change_of_the_disk(exchange: str, sources: dict[str, Path], tmp_path: Path):
    """With an old checkpoint that is replaced: at each moment the old or the new one is there, or comes back."""
    source, out = sources["mixtral"], tmp_path / "out"

    def run(number: int, *options: str) -> subprocess.CompletedProcess[str]:
        call = [sys.executable, "-c", _KILLED_AT, str(number), exchange, "quantize", str(source), "-o", str(out)]
        call += ["--quiet", "--device", "cpu", "--calibration", "none", "--max-rounds", "1", *options]
        return subprocess.run(call, capture_output=True, text=True, check=False)

    first = run(0, "--seed", "1")
    assert first.returncode == 0, first.stderr
    old = hashes(out)
    again = run(0, "--overwrite")
    new, calls = hashes(out), int(again.stdout.split()[-1])
    assert old != new
    absent = 0
    for number in range(1, calls + 1):
        assert run(0, "--overwrite", "--seed", "1").returncode == 0
        killed = run(number, "--overwrite")
        assert killed.returncode in (-signal.SIGKILL, 0), killed.stderr
        if out.exists():
            assert hashes(out) in (old, new), number
        else:
            absent += 1
        done = run(0, "--overwrite", "--resume")
        assert done.returncode == 0, done.stderr
        assert hashes(out) == new
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [], number
    print(f"{exchange}: {calls} kills; {absent} left nothing at the output until the next run")
    assert absent == (exchange == "without-exchange")
