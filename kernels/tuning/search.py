"""The search at one number of tokens, over whatever takes the time of a pair of tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from ..tuned import Tiles
from ..weights import MoEShape
from .candidates import first_candidates, second_candidates
from .timing import Budget, error_text

GAIN = 0.01
"""Tiles replace the heuristic's if they take so much less: below are differences between two measurements."""


class Result(NamedTuple):
    """A candidate's time, or why it has none."""

    tiles: Tiles
    microseconds: float | None
    error: str | None


def search(
    tokens: int, shape: MoEShape, device: torch.device, microseconds: Callable[[Tiles], float], budget: Budget
) -> list[Result]:
    """Return the results of all candidates, the heuristic's first: those of the first GEMM, then of the second.

    Args:
        tokens: of a call.
        shape: of the layer.
        device: whose size decides the candidates.
        microseconds: returns the time of a pair of tiles; raises where it does not compile, fit or compute rightly.
        budget: no candidate but the heuristic's is begun after it.
    """
    firsts = first_candidates(tokens, shape, device)
    results = [_measure(firsts[0], microseconds)]
    _extend(results, firsts[1:], microseconds, budget)
    winner = best(results)
    if winner is not None:
        _extend(results, second_candidates(tokens, shape, winner.tiles, device), microseconds, budget)
    return results


def best(results: Sequence[Result]) -> Result | None:
    """Return the fastest candidate, or the first if none takes less by :data:`GAIN`; None where none is right."""
    timed = [(result.microseconds, result) for result in results if result.microseconds is not None]
    if not timed:
        return None
    least, fastest = min(timed, key=lambda pair: pair[0])
    default = results[0].microseconds
    return results[0] if default is not None and default * (1 - GAIN) <= least else fastest


def _extend(
    results: list[Result], tried: Iterable[Tiles], microseconds: Callable[[Tiles], float], budget: Budget
) -> None:
    known = {result.tiles for result in results}
    for tiles in tried:
        if budget.spent():
            return
        if tiles not in known:
            results.append(_measure(tiles, microseconds))


def _measure(tiles: Tiles, microseconds: Callable[[Tiles], float]) -> Result:
    try:
        return Result(tiles, microseconds(tiles), None)
    except Exception as error:  # out of shared memory, unsupported tiles, wrong results: all of interest
        return Result(tiles, None, error_text(error))
