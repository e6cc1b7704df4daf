"""Counts what comes of requests: whether answers are the quiet server's, what failed, and how long it took.

Answers are compared as they come and none is kept, so that the memory of the clients stays flat however long they ask.
"""

from __future__ import annotations

import statistics
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.serving.soaking.requests import Answer, Outcome

ROUNDING = 1e-3
"""Nats by which a gap of two printed log-probabilities may be off."""


def first_difference(quiet: Answer, loaded: Answer) -> tuple[int, float] | None:
    """Return where two answers differ first, and by how many nats the quiet server preferred its token there.

    That is infinite where the other token was none of its likeliest. None where the answers are the same.
    """
    pairs = zip(quiet.tokens, loaded.tokens, strict=False)
    place = next((index for index, (one, other) in enumerate(pairs) if one != other), None)
    if place is None:
        lengths = len(quiet.tokens), len(loaded.tokens)
        return None if lengths[0] == lengths[1] else (min(lengths), float("inf"))
    top = quiet.likeliest[place]
    own, other = quiet.tokens[place], loaded.tokens[place]
    return place, top[own] - top[other] if other in top else float("inf")


class Comparison:
    """Counts how many answers are those of the quiet server.

    Args:
        quiet: its answers.
        near: nats between two tokens of it that rounding may tip.
    """

    def __init__(self, quiet: Sequence[Answer], near: float) -> None:
        self._quiet, self._near = quiet, near
        self._exact = self._ties = self._other = 0
        self._largest: float | None = None
        self._gaps: Counter[str] = Counter()

    def add(self, index: int, answer: Answer) -> None:
        """Compare one answer, to the request of this number."""
        difference = first_difference(self._quiet[index], answer)
        if difference is None:
            self._exact += 1
            return
        gap = min(difference[1], 1e9)  # JSON has no infinity
        self._largest = gap if self._largest is None else max(self._largest, gap)
        self._gaps[f"{gap:.2f}"] += 1
        if gap <= self._near + ROUNDING:
            self._ties += 1
        else:
            self._other += 1

    def summary(self) -> dict[str, Any]:
        """Return the counts so far, also by the gap in hundredths of a nat, and the largest gap."""
        differ = self._ties + self._other
        return {
            "answers": self._exact + differ,
            "exact": self._exact,
            "near_ties": self._ties,
            "near_tie_share": self._ties / differ if differ else None,
            "other": self._other,
            "largest_gap": self._largest,
            "gaps": dict(sorted(self._gaps.items(), key=lambda item: float(item[0]))),
        }


def compare(quiet: Sequence[Answer], answered: Iterable[tuple[int, Answer]], near: float) -> dict[str, Any]:
    """Return the counts of all these answers, each with the number of its request; see :class:`Comparison`."""
    comparison = Comparison(quiet, near)
    for index, answer in answered:
        comparison.add(index, answer)
    return comparison.summary()


class Tally:
    """Counts requests, what came of them, and how long answers took; compares the answers, see :class:`Comparison`."""

    def __init__(self, quiet: Sequence[Answer], near: float) -> None:
        self._comparison = Comparison(quiet, near)
        self._kinds: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._left = 0
        self._seconds = array("d")

    def add(self, outcome: Outcome) -> None:
        """Count one request."""
        self._kinds[outcome.kind] += 1
        if outcome.error is not None:
            self._errors[outcome.error] += 1
        elif outcome.answer is None:
            self._left += 1
        else:
            self._seconds.append(outcome.seconds)
            self._comparison.add(outcome.request, outcome.answer)

    def summary(self) -> dict[str, Any]:
        """Return the counts of requests and those of answers, as a record names them."""
        requests = {
            "all": self._kinds.total(),
            "by_kind": dict(self._kinds),
            "left_by_clients": self._left,
            "failed": self._errors.total(),
            "errors": dict(self._errors.most_common(5)),
            "median_seconds": statistics.median(self._seconds) if self._seconds else None,
            "longest_seconds": max(self._seconds, default=None),
        }
        return {"requests": requests, "load": self._comparison.summary()}
