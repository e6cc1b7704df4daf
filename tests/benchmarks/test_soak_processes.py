"""What a soak knows of processes: their memory, the devices that they see, and how long they have run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import ROOT
from benchmarks.serving.soaking.processes import Sampler, device_bytes, members

GPUS = """#!/bin/sh
# a host with three GPUs
chosen="0 1 GPU-c"
while [ $# -gt 0 ]; do
    [ "$1" = -i ] && chosen=$(echo "$2" | tr , " ")
    shift
done
for gpu in $chosen; do
    case $gpu in
    0) echo 100 ;;
    1) echo 200 ;;
    GPU-c) echo 400 ;;
    mig) echo "[N/A]" ;;
    *) echo "No devices were found" && exit 6 ;;
    esac
done
"""


@pytest.mark.parametrize(
    ("visible", "mebibytes"),
    [
        (None, 700),
        ("0", 100),
        ("1,GPU-c", 600),
        (" 0, 1", 300),
        ("0,-1,1", 100),
        ("", None),
        ("-1", None),
        ("7", None),
        ("0,mig", None),
    ],
)
def test_devices_that_the_server_does_not_see_do_not_count(
    visible: str | None, mebibytes: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "nvidia-smi").write_text(GPUS)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device_bytes() == (None if mebibytes is None else mebibytes * 2**20)


def test_no_device_without_its_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device_bytes() is None


def test_seconds_of_a_process_begin_before_its_imports():
    code = "import time; time.sleep(0.5); from benchmarks.serving.soaking.processes import process_seconds"
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print(process_seconds())"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0.5 < float(done.stdout) < time.monotonic() - start + 0.1  # of which /proc keeps hundredths


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
        seconds = [sample.seconds for sample in sampler.samples]
        assert seconds == sorted(seconds)
        assert 0 <= seconds[0] < seconds[-1] < 1
    finally:
        process.communicate(b"\n", timeout=30)
    assert not members(process.pid)
