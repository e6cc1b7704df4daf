"""How far a stage is, in numbers and as a line of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Stage:
    """How far a stage is. Inside an item there may be a stage of its own, as the training steps of a layer.

    Args:
        what: its name.
        unit: what its items are called.
        sizes: how much work each item is.
        now: seconds on some clock.
    """

    def __init__(self, what: str, unit: str, sizes: Sequence[float], now: float) -> None:
        self.what, self.unit, self.sizes = what, unit, sizes
        self.done = 0
        self.item = ""
        self.inside: Stage | None = None
        self._begin = self._last = now

    def begin(self, item: str) -> None:
        """Note the name of the item that is worked on now; empty where it has none."""
        self.item, self.inside = item, None

    def advance(self, now: float) -> None:
        """Note that one more item is done."""
        self.done, self._last = self.done + 1, now
        self.begin("")

    def elapsed(self, now: float) -> float:
        """Return the seconds since the stage began."""
        return now - self._begin

    def remaining(self, now: float) -> float | None:
        """Return the seconds that are left if the other items take as long as those that are done; None at first."""
        done = sum(self.sizes[: self.done])
        if not done:
            return None
        each = (self._last - self._begin) / done
        return max(0.0, each * (sum(self.sizes) - done) - (now - self._last))

    def line(self, now: float) -> str:
        """Return the stage, how much of it is done, the time that it took and will take, and what is worked on."""
        said = f"{self.what}: {self.done} of {len(self.sizes)} {self.unit}s, {clock(self.elapsed(now))} elapsed"
        if self.done == len(self.sizes):
            return said
        left, work = self.remaining(now), self.work(now)
        said += "" if left is None else f", about {clock(left)} left"
        return f"{said}; {work}" if work else said

    def work(self, now: float) -> str:
        """Return what is worked on as text: the item, and how far the stage inside of it is; empty if unknown."""
        inside = self.inside
        if inside is None:
            return self.item
        text = inside.what
        if inside.sizes:
            left = inside.remaining(now)
            text += f" {inside.done} of {len(inside.sizes)} {inside.unit}s"
            text += "" if left is None else f", about {clock(left)} left of these"
        return f"{self.item}: {text}" if self.item else text

    def describe(self, now: float) -> dict[str, Any]:
        """Return the same for machines; seconds that are not known are None."""
        left = self.remaining(now)
        said: dict[str, Any] = {"stage": self.what, "unit": self.unit, "done": self.done, "of": len(self.sizes)}
        said |= {"seconds": round(self.elapsed(now), 3), "seconds_left": None if left is None else round(left, 3)}
        if self.item:
            said[self.unit] = self.item
        if self.inside is not None:
            said["part"] = self.inside.describe(now)
        return said


def clock(seconds: float) -> str:
    """Return a time as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
