"""The batches of layers, whose weights are read from the source when their turn comes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from ..batches import Rule, plan_batches
from ..calibration.layer_moments import NoMoments
from ..nouns import Moments, Recipe
from ..source.layers import Layer
from ..source.reader import ModelReader
from .job import Job, Unread, stacked


def load_batches(
    reader: ModelReader,
    layers: Sequence[Layer],
    ranks: Mapping[str, int],
    recipe: Recipe,
    rule: Rule,
    pinned: bool,
) -> Iterator[Job]:
    """Yield the batches of some layers, each matrix in one.

    Whoever solves a batch reads its weights. Only those of shards that come and go are read here, on the host.

    Args:
        reader: the source model.
        layers: whose matrices are solved together.
        ranks: of these, by name.
        recipe: of the solver.
        rule: how many matrices go together.
        pinned: see :meth:`.Job.read`.
    """
    sources = {source.matrix: source for layer in layers for source in layer.matrices}
    for matrices in plan_batches(sources, NoMoments(), ranks, rule):
        parts = [reader.part(sources[matrix]) for matrix in matrices]
        about = (Moments(), [ranks[matrix.name] for matrix in matrices], recipe, reader.dtype)
        places = [part.place for part in parts]
        if not reader.shards.streamed:
            yield Job(matrices, Unread(parts), *about, places)
            continue
        start = time.monotonic()
        weights = stacked([reader.load_matrix(sources[matrix]) for matrix in matrices], pinned)
        yield Job(matrices, weights, *about, places, time.monotonic() - start)
        del weights
