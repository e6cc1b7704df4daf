"""Waiting for a Hub that hangs, or sends a byte now and then: as long as something comes, and no longer."""

from __future__ import annotations

import concurrent.futures
import time
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from huggingface_hub import constants

from ..errors import PassingError

SECONDS = 300.0
"""Without any progress, after which nobody waits any more. The library writes 10 MB at a time, so that a connection of
less than 33 kB a second counts as none: a shard of 5 GB would take two days."""
POLL = 0.5

Result = TypeVar("Result")


class Patience:
    """Waits for what threads do as long as something moves: files of a folder, or what is noted.

    Args:
        what: is waited for; begins the message.
        folder: where downloads are written; None for what is none.
    """

    def __init__(self, what: str, folder: Path | None = None) -> None:
        self._what, self._folder = what, folder
        self._files = self._written()
        self._moved = time.monotonic()

    def note(self) -> None:
        """Note that something moved; any thread may."""
        self._moved = time.monotonic()

    def wait(self, work: Future[Result]) -> Result:
        """Return what a thread makes, or raise what it raises.

        Raises:
            PassingError: nothing moved for :data:`SECONDS`.
        """
        while True:
            try:
                return work.result(POLL)
            except concurrent.futures.TimeoutError:
                if work.done():  # an error of the work itself
                    raise
            written = self._written()
            if written != self._files:
                self._files = written
                self.note()
            elif time.monotonic() - self._moved > SECONDS:
                raise PassingError(
                    f"{self._what}: nothing came from the Hugging Face Hub ({constants.ENDPOINT}) for {SECONDS:.0f} s; "
                    f"is the network or the Hub slow? What is there is kept: try again later"
                )

    def _written(self) -> set[tuple[str, int, int]]:
        """Return the files of the folder, by name, bytes and time of the last change."""
        found = set()
        for path in self._folder.rglob("*") if self._folder is not None else ():
            try:
                status = path.stat()
            except OSError:  # gone or renamed meanwhile, which is progress too
                continue
            found.add((str(path), status.st_size, status.st_mtime_ns))
        return found
