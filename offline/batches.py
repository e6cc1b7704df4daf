"""Matrices of one shape in batches, so that the solver works on many at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch

from .calibration.layer_moments import LayerMoments
from .nouns import LoadedMatrix, Matrix, Moments

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


class Rule(NamedTuple):
    """What decides which matrices are solved together, beside their shapes. Results may depend on it, so nothing that
    changes from one run to the next may be part of it.

    Attributes:
        elements: most weights of a batch, but for one that is larger by itself; numbers of its moments count too.
        mixed: whether a batch may hold several ranks above 0.
    """

    elements: int
    mixed: bool = True


def plan_batches(
    matrices: Iterable[Matrix], moments: LayerMoments, ranks: Mapping[str, int], rule: Rule
) -> Iterator[list[Matrix]]:
    """Group matrices by shape, in order of rank, so that the solver works on many at once.

    Args:
        matrices: of one layer or several.
        moments: of these.
        ranks: of every matrix, by name; those that it lacks count as one rank.
        rule: how many go together.
    """
    groups: dict[tuple[int, int, int, str], list[Matrix]] = defaultdict(list)
    for matrix in matrices:
        rank = ranks.get(matrix.name, 0)
        groups[matrix.n, matrix.k, min(rank, 1) if rule.mixed else rank, moments.group(matrix)].append(matrix)
    for members in groups.values():
        members.sort(key=lambda member: ranks.get(member.name, 0))
        footprint = members[0].n * members[0].k + moments.numbers(members[0])
        size = max(1, rule.elements // footprint)
        yield from (members[start : start + size] for start in range(0, len(members), size))


def batches(
    loaded: Sequence[LoadedMatrix], moments: LayerMoments, ranks: Mapping[str, int], mixed: bool = True
) -> Iterator[Batch]:
    """Yield the batches of a layer's matrices that are in memory, in float32; see :func:`plan_batches`."""
    held = dict(loaded)
    for _, first in loaded[:1]:
        rule = Rule(batch_elements(first.device), mixed)
        for matrices in plan_batches(held, moments, ranks, rule):
            weights = torch.stack([held[matrix] for matrix in matrices]).float()
            yield Batch(matrices, weights, moments.of(matrices, weights.device))


class Sized(Protocol):
    """What has a number of weights: a decoder layer."""

    @property
    def weights(self) -> int:
        """Return the number of weights of its matrices."""


AnyLayer = TypeVar("AnyLayer", bound=Sized)


def gather_layers(layers: Iterable[AnyLayer], device: torch.device, elements: int) -> Iterator[list[AnyLayer]]:
    """Put layers together that follow each other, so that the solver's batches are full where layers are small.

    A GPU works as long on a few small matrices as on many. A CPU gets one layer at a time.

    Args:
        layers: of the model.
        device: where they are solved.
        elements: most weights of a batch.
    """
    most = elements if device.type == "cuda" else 0
    together: list[AnyLayer] = []
    for layer in layers:
        if together and sum(one.weights for one in [*together, layer]) > most:
            yield together
            together = []
        together.append(layer)
    if together:
        yield together
