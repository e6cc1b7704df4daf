"""Reads the batches of layers from the source, each when its turn comes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from ..batches import Rule, plan_batches
from ..calibration.layer_moments import NoMoments
from ..nouns import Moments, Recipe
from ..source.layers import Layer, Source
from ..source.reader import ModelReader
from .job import Job


def load_batches(
    reader: ModelReader,
    layers: Sequence[Layer],
    ranks: Mapping[str, int],
    recipe: Recipe,
    rule: Rule,
    pinned: bool,
) -> Iterator[Job]:
    """Yield the batches of some layers with their weights on the host; each matrix is read once, and when it is wanted.

    Args:
        reader: the source model.
        layers: whose matrices are solved together.
        ranks: of these, by name.
        recipe: of the solver.
        rule: how many matrices go together.
        pinned: whether weights go to a GPU, which copies them several times as fast from memory that is not paged.
    """
    sources = {source.matrix: source for layer in layers for source in layer.matrices}
    for matrices in plan_batches(sources, NoMoments(), ranks, rule):
        of = [sources[matrix] for matrix in matrices]
        places = [f"{reader.tensors[source.tensor].file}: tensor {source.tensor}" for source in of]
        weights = _stacked(reader, of, pinned)
        yield Job(matrices, weights, Moments(), [ranks[m.name] for m in matrices], recipe, reader.dtype, places)
        del weights


def _stacked(reader: ModelReader, sources: Sequence[Source], pinned: bool) -> torch.Tensor:
    """Return matrices of one shape as they are stored, [B, N, K]; in float32 where their dtypes differ."""
    first = sources[0].matrix
    parts = [reader.load_matrix(source) for source in sources]  # files in memory, read from the disk below
    dtype = parts[0].dtype if len({part.dtype for part in parts}) == 1 else torch.float32
    into = torch.empty(len(parts), first.n, first.k, dtype=dtype, pin_memory=pinned)
    for place, part in zip(into, parts, strict=True):
        place.copy_(part)
    return into
