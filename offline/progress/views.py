"""What shows a stage: a bar, lines of text, and events of a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm import tqdm

from .log import EventLog
from .stage import Stage

EVERY = 30.0
"""Seconds between two lines, and between two events of an item that takes long."""
REDRAWN = 1.0
"""Seconds between two looks at a bar that nothing else moves."""


class View(Protocol):
    """Shows a stage."""

    @property
    def every(self) -> float:
        """Seconds between two ticks."""

    def tick(self) -> None:
        """Show the stage anew, because time has passed."""

    def changed(self) -> None:
        """Note that something else is worked on."""

    def advanced(self, name: str) -> None:
        """Note that the item of this name is done."""

    def close(self) -> None:
        """Note that the stage has ended, with its items done or not."""


class Lines:
    """A line every so often; the last says how the stage went."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.every = EVERY

    def tick(self) -> None:
        """Print a line."""
        print(self._stage.line(time.monotonic()), file=sys.stderr, flush=True)

    def changed(self) -> None:
        """Do nothing: lines go by time."""

    def advanced(self, name: str) -> None:
        """Do nothing: lines go by time."""

    def close(self) -> None:
        """Print the last line of a stage that is done."""
        if self._stage.done == len(self._stage.sizes):
            self.tick()


class Bar:
    """A bar on a terminal."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.every = REDRAWN
        self._bar = tqdm(total=len(stage.sizes), desc=stage.what, unit=stage.unit, file=sys.stderr, dynamic_ncols=True)
        self._drawn = time.monotonic()

    def tick(self) -> None:
        """Draw the bar."""
        self._drawn = time.monotonic()
        self._bar.set_postfix_str(self._stage.work(self._drawn))

    def changed(self) -> None:
        """Draw the bar, unless that was just done."""
        if time.monotonic() - self._drawn > REDRAWN / 5:
            self.tick()

    def advanced(self, name: str) -> None:
        """Move the bar."""
        self._bar.update()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.set_postfix_str("", refresh=False)
        self._bar.close()


class Logged:
    """Events ``begin``, ``progress`` and ``end`` of a stage: one for each layer, fewer for smaller items."""

    def __init__(self, stage: Stage, log: EventLog) -> None:
        self._stage, self._log = stage, log
        self.every = EVERY
        self._last = time.monotonic()
        self._write("begin")

    def _write(self, event: str, **more: str) -> None:
        self._last = time.monotonic()
        self._log.write(event, **(self._stage.describe(self._last) | more))

    def tick(self) -> None:
        """Say how far an item is that takes long."""
        self._write("progress")

    def changed(self) -> None:
        """Do nothing: there would be thousands."""

    def advanced(self, name: str) -> None:
        """Say that an item is done."""
        if name or time.monotonic() - self._last >= 1:
            self._write("progress", **({self._stage.unit: name} if name else {}))

    def close(self) -> None:
        """Say that the stage is done; one that fails has no end."""
        if self._stage.done == len(self._stage.sizes):
            self._write("end")


@contextmanager
def ticking(view: View) -> Iterator[None]:
    """Let a thread tick a view while something runs: an item may take long."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(view.every):
            view.tick()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
