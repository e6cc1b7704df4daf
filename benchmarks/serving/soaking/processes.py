"""The processes of a server, found by their session, and the memory that they and the devices hold. Linux only."""

from __future__ import annotations

import shutil
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

PAGE = 4096


class Sample(NamedTuple):
    """Bytes held: by all processes of a session together, and on all devices; None where there are none."""

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


def device_bytes() -> int | None:
    """Return the bytes that are used on all GPUs, whoever uses them; None without GPUs."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return sum(int(line) for line in done.stdout.split()) * 2**20 if done.returncode == 0 else None


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
        while True:
            self.samples.append(Sample(sum(members(self._session).values()), device_bytes()))
            if self._over.wait(self._seconds):
                return
