"""How far a stage is: a bar on a terminal, elsewhere a line every half minute; both with the time that is left."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

EVERY = 30.0
"""Seconds between two lines."""


def progress_bar(
    items: Sequence[Item], what: str, progress: bool, unit: str = "layer", sizes: Sequence[float] | None = None
) -> Iterator[Item]:
    """Iterate over ``items`` and show on stderr how far that is, and the remaining time.

    Args:
        items: of the stage.
        what: the stage's name.
        progress: show anything at all.
        unit: what an item is called.
        sizes: how much work each item is, where they differ; the time that lines state goes by it.
    """
    if not progress:
        return iter(items)
    if sys.stderr.isatty():
        return iter(tqdm(items, desc=what, unit=unit, file=sys.stderr))
    return _with_lines(items, Stage(what, unit, [1.0] * len(items) if sizes is None else sizes, time.monotonic()))


class Stage:
    """How far a stage is, as a line of text.

    Args:
        what: its name.
        unit: what its items are called.
        sizes: how much work each item is.
        now: seconds on some clock.
    """

    def __init__(self, what: str, unit: str, sizes: Sequence[float], now: float) -> None:
        self._what, self._unit, self._sizes = what, unit, sizes
        self._begin = self._last = now
        self._done = 0

    def advance(self, now: float) -> None:
        """Note that one more item is done."""
        self._done, self._last = self._done + 1, now

    def remaining(self, now: float) -> float | None:
        """Return the seconds that are left if the other items take as long as those that are done; None at first."""
        done = sum(self._sizes[: self._done])
        if not done:
            return None
        each = (self._last - self._begin) / done
        return max(0.0, each * (sum(self._sizes) - done) - (now - self._last))

    def line(self, now: float) -> str:
        """Return the stage, how much of it is done, and the time that it took and will take."""
        said = f"{self._what}: {self._done} of {len(self._sizes)} {self._unit}s, {_clock(now - self._begin)} elapsed"
        left = self.remaining(now)
        if self._done == len(self._sizes) or left is None:
            return said
        return f"{said}, about {_clock(left)} left"


def _with_lines(items: Sequence[Item], stage: Stage) -> Iterator[Item]:
    """Iterate, while a thread prints a line every so often; an item may take long. The last line says how it went."""
    ended = threading.Event()
    threading.Thread(target=_print_lines, args=(stage, ended), daemon=True).start()
    try:
        for item in items:
            yield item
            stage.advance(time.monotonic())
        _print(stage)
    finally:
        ended.set()


def _print_lines(stage: Stage, ended: threading.Event) -> None:
    while not ended.wait(EVERY):
        _print(stage)


def _print(stage: Stage) -> None:
    print(stage.line(time.monotonic()), file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    """Return a time as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
