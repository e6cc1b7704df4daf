"""Tunes tiles for a shape over token counts, within a given time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

import torch

from ..serving.gemm.heuristic import heuristic_configs
from ..tuned import Tiles
from ..weights import MoEShape
from .candidates import all_candidates
from .compiling import compile_candidates, processes
from .layer import Layer, Point
from .search import Result, best, search
from .timing import Budget

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Close to each other, since the nearest entry of a file is used."""
POINT_SECONDS = 0.02
"""Of measuring one pair of tiles."""
COMPILING = 0.5
"""Share of the time after which no further kernel is compiled ahead."""

Results = Mapping[int, Sequence[Result]]
"""The results of all candidates by number of tokens."""


def tune(
    shape: MoEShape,
    device: torch.device,
    seconds: float,
    dtype: torch.dtype = torch.bfloat16,
    tokens: Sequence[int] = TOKENS,
    say: Callable[[str], None] = print,
) -> dict[int, list[Result]]:
    """Return the results of all candidates by number of tokens.

    Kernels are compiled first, the likely ones of every number of tokens before others. What is left of the time is
    shared evenly over the numbers of tokens; the heuristic's tiles are timed even where nothing is left.

    Args:
        shape: of the experts in this process.
        device: a GPU.
        seconds: for everything.
        dtype: of the activations.
        tokens: numbers of tokens.
        say: told a line on compiling, and one for each number of tokens.
    """
    budget, compiling = Budget(seconds), Budget(COMPILING * seconds)
    here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with here, torch.inference_mode():
        layer = Layer(shape, device, dtype)
        _compile(layer, tokens, compiling, say)
        return _search(layer, tokens, budget, say)


def _compile(layer: Layer, tokens: Sequence[int], budget: Budget, say: Callable[[str], None]) -> None:
    """Compile what candidates launch; the interpreter compiles nothing."""
    if layer.device.type != "cuda":
        return
    lists = [[(count, tiles) for tiles in all_candidates(count, layer.shape, layer.device)] for count in tokens]
    wanted = [one[place] for place in range(max(map(len, lists))) for one in lists if place < len(one)]
    done = compile_candidates(layer, wanted, processes(), budget)
    say(f"{done} kernels compiled for {len(wanted)} pairs of tiles")


def _search(layer: Layer, tokens: Sequence[int], budget: Budget, say: Callable[[str], None]) -> dict[int, list[Result]]:
    results: dict[int, list[Result]] = {}
    for place, count in enumerate(tokens):
        share = Budget(budget.left() / (len(tokens) - place))
        point = Point(layer, count, POINT_SECONDS)
        results[count] = search(count, layer.shape, layer.device, point.microseconds, share)
        say(line(count, results[count]))
    return results


def chosen(results: Results, shape: MoEShape, device: torch.device) -> dict[int, Tiles]:
    """Return the best tiles by number of tokens; the heuristic's where no candidate was right."""
    found = {}
    for tokens, rows in results.items():
        winner = best(rows)
        found[tokens] = heuristic_configs(tokens * shape.top_k, shape, device) if winner is None else winner.tiles
    return found


def line(tokens: int, results: Sequence[Result]) -> str:
    """Return a line on the results at one number of tokens."""
    winner, failed = best(results), sum(result.error is not None for result in results)
    said = f"{tokens} tokens: {len(results)} candidates" + (f", {failed} failed" if failed else "")
    if winner is None or winner.microseconds is None:
        return f"{said}: {results[0].error}"
    default = results[0].microseconds
    was = "failed" if default is None else f"{default:.1f} us, {default / winner.microseconds - 1:+.1%}"
    tiles = ", ".join(
        f"{tile.block_m}x{tile.block_n}" + (f" in {tile.split_k} parts" if tile.split_k > 1 else "")
        for tile in winner.tiles
    )
    return f"{said}: {winner.microseconds:.1f} us with {tiles} (heuristic {was})"
