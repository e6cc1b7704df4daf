"""The processes of a server, found by their session, and the memory that they and its devices hold. Linux only."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

PAGE = 4096


class Sample(NamedTuple):
    """Seconds since sampling began, and bytes held: by all processes of a session together, and on the devices."""

    seconds: float
    host: int
    device: int | None


def members(session: int) -> dict[int, int]:
    """Return the processes of a session, each with the bytes that are resident of it."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            resident = int((folder / "statm").read_text().split()[1]) * PAGE
        except (OSError, IndexError):  # it has just ended
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found[int(folder.name)] = resident
    return found


def process_seconds() -> float:
    """Return how long this process has run, its imports included."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def visible_devices() -> list[str] | None:
    """Return what CUDA_VISIBLE_DEVICES names, which CUDA reads up to the first -1; None where it is not set."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return None
    names = (name.strip() for name in value.split(","))
    return list(itertools.takewhile(lambda name: name not in ("", "-1"), names))


def device_bytes() -> int | None:
    """Return the bytes that are used, by whomever, on the GPUs that a server of this environment sees.

    Numbers are nvidia-smi's, which are CUDA's where all GPUs are alike. None without GPUs, or where it does not tell.
    """
    visible = visible_devices()
    if shutil.which("nvidia-smi") is None or visible == []:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    command += ["-i", ",".join(visible)] if visible else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    words = done.stdout.split()
    # there may be "[N/A]" in place of a number, or a sentence
    told = done.returncode == 0 and words and all(word.isdigit() for word in words)
    return sum(int(word) for word in words) * 2**20 if told else None


class Sampler:
    """A context manager that samples memory in a thread of its own.

    Args:
        session: of the server.
        seconds: between samples.
    """

    def __init__(self, session: int, seconds: float) -> None:
        self.samples: list[Sample] = []
        self._session, self._seconds, self._over = session, seconds, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        begun = time.monotonic()
        while True:
            seconds = round(time.monotonic() - begun, 2)
            self.samples.append(Sample(seconds, sum(members(self._session).values()), device_bytes()))
            if self._over.wait(self._seconds):
                return
