"""Matrices of one shape in batches, so that the solver works on many at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from .calibration.layer_moments import LayerMoments
from .nouns import LoadedMatrix, Matrix, Moments
from .source.layers import Layer
from .source.reader import ModelReader

BATCH_ELEMENTS = {"cpu": 2**18, "cuda": 2**28}
"""Most weights that the solver takes at once: on a CPU what its cache holds, on a GPU what fills it. The solver
needs about ten float32 copies of them."""


def batch_elements(device: torch.device) -> int:
    """Return the most weights that the solver takes at once on a device."""
    return BATCH_ELEMENTS.get(device.type, 2**26)


class Batch(NamedTuple):
    """Matrices of one shape, their weights [B, N, K] and what errors in them cost."""

    matrices: list[Matrix]
    weights: torch.Tensor
    moments: Moments


def batches(
    loaded: Sequence[LoadedMatrix], moments: LayerMoments, ranks: Mapping[str, int], mixed: bool = True
) -> Iterator[Batch]:
    """Group a layer's matrices by shape, in order of rank, so that the solver works on many at once.

    Args:
        loaded: the layer's matrices with their weights.
        moments: of the layer.
        ranks: of every matrix, by name; those that it lacks count as one rank.
        mixed: whether a batch may hold several ranks above 0.
    """
    groups: dict[tuple[int, int, int, str], list[LoadedMatrix]] = defaultdict(list)
    for matrix, weights in loaded:
        rank = ranks.get(matrix.name, 0)
        groups[matrix.n, matrix.k, min(rank, 1) if mixed else rank, moments.group(matrix)].append((matrix, weights))
    for members in groups.values():
        members.sort(key=lambda member: ranks.get(member[0].name, 0))
        first, device = members[0][0], members[0][1].device
        footprint = first.n * first.k + moments.numbers(first)
        size = max(1, batch_elements(device) // footprint)
        for start in range(0, len(members), size):
            chunk = members[start : start + size]
            matrices = [matrix for matrix, _ in chunk]
            weights = torch.stack([weights for _, weights in chunk]).float()
            yield Batch(matrices, weights, moments.of(matrices, device))


def load_batches(
    reader: ModelReader,
    layers: Sequence[Layer],
    moments: LayerMoments,
    ranks: Mapping[str, int],
    device: torch.device,
    mixed: bool = True,
) -> Iterator[Batch]:
    """Load layers and yield the :func:`batches` of their matrices; their weights are gone after the last."""
    loaded = [member for layer in layers for member in reader.load_layer(layer, device)]
    if loaded:
        yield from batches(loaded, moments, ranks, mixed)


def gather_layers(layers: Iterable[Layer], device: torch.device) -> Iterator[list[Layer]]:
    """Put layers together that follow each other, so that the solver's batches are full where layers are small.

    A GPU works as long on a few small matrices as on many. A CPU gets one layer at a time.
    """
    most = batch_elements(device) if device.type == "cuda" else 0
    together: list[Layer] = []
    for layer in layers:
        if together and sum(one.weights for one in [*together, layer]) > most:
            yield together
            together = []
        together.append(layer)
    if together:
        yield together
