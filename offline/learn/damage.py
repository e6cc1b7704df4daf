"""What replacing some weights of a decoder layer does to its output: which of its roles can least bear an error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from ..source.streamed_model import StreamedModel
from .layer import LayerLoss

Replacement = tuple[torch.Tensor, torch.Tensor]
"""A matrix in the layer, a view [N, K] of its parameter, and the values [N, K] that take its place."""


class Damage:
    """Compares a layer with itself on the same inputs, so that what it says is due to the replaced weights alone.

    Args:
        model: whose layer it is.
        index: of the layer.
        module: the layer with its original weights.
        states: hidden states before the layer, [W, T, H].
        batch: windows that run at once.
    """

    def __init__(
        self, model: StreamedModel, index: int, module: torch.nn.Module, states: torch.Tensor, batch: int
    ) -> None:
        self._windows, self._batch = torch.arange(len(states)), batch
        self._loss = LayerLoss(model, index, module, states, model.advance(index, module, states, batch))

    def of(self, replacements: Iterable[Replacement]) -> float:
        """Return the mean squared error of the output, each token's divided by the energy of its own output.

        The layer has its own weights again afterwards, to the bit.
        """
        with _replaced(replacements):
            return self._loss.mean(self._windows, self._batch)


@contextmanager
def _replaced(replacements: Iterable[Replacement]) -> Iterator[None]:
    kept = []
    try:
        for place, values in replacements:
            kept.append((place, place.clone()))
            place.copy_(values)
        yield
    finally:
        for place, values in kept:
            place.copy_(values)
