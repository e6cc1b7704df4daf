"""The real command is killed at random moments, again and again; what comes of it is what comes of one run."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

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


class Killed(NamedTuple):
    """How a series of runs went: those that were killed, those of them that went on with layers, and seconds."""

    kills: int
    resumed: int
    seconds: float


def kill_and_resume(call: list[str], kills: int, whole: float, seed: int) -> Killed:
    """Run until it is done, and kill as often.

    Args:
        call: the command, without --resume.
        kills: most of them.
        whole: seconds of a run from start to end.
        seed: of the moments.
    """
    moments, start, resumed = random.Random(seed), time.monotonic(), 0
    # imports take most of a tiny conversion: a kill among them shows nothing
    for number in range(kills):
        running = subprocess.Popen([*call, "--resume"], stderr=subprocess.PIPE, text=True)
        try:
            _, said = running.communicate(timeout=whole * moments.uniform(0.3, 1.0))
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGKILL)
            _, said = running.communicate()
            resumed += "going on after" in said
            continue
        assert running.returncode == 0, said
        return Killed(number, resumed, time.monotonic() - start)
    done = subprocess.run([*call, "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Killed(kills, resumed + ("going on after" in done.stderr), time.monotonic() - start)


def check(how: str, model: Path, folder: Path, kills: int) -> None:
    begin = time.monotonic()
    subprocess.run(command(model, folder / "whole", how), check=True, capture_output=True)
    whole = time.monotonic() - begin
    total = resumed = rounds = 0
    while total < kills:
        out = folder / f"out-{rounds}"
        found = kill_and_resume(command(model, out, how), kills - total, whole, seed=rounds)
        total, resumed, rounds = total + found.kills, resumed + found.resumed, rounds + 1
        assert hashes(out) == hashes(folder / "whole")
        assert rounds < 2 * kills
    print(
        f"{how}: {total} kills in {rounds} conversions, {resumed} runs went on with finished layers; one: {whole:.1f} s"
    )
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


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
