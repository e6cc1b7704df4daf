"""The interface of what says what errors cost, a source of second moments; and the source that knows none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from ..nouns import LoadedMatrix, Matrix, Moments
from ..source.layers import Layer
from ..source.reader import ModelReader

MAX_FULL_SIZE = 8192
"""Sides up to this get full second moments."""


def moment_numbers(size: int) -> int:
    """Return how many numbers a second moment of ``size`` activations holds: all of it, or its diagonal."""
    return size * size if size <= MAX_FULL_SIZE else size


class LayerMoments(Protocol):
    """The second moments of the matrices of one layer."""

    def group(self, matrix: Matrix) -> str:
        """Return a name that matrices must have in common to be quantized in one batch."""

    def numbers(self, matrix: Matrix) -> int:
        """Return how many numbers the moments of one more matrix of a batch take."""

    def of(self, matrices: Sequence[Matrix], device: torch.device) -> Moments:
        """Return the moments of matrices of one shape and group."""


class MomentSource(Protocol):
    """The second moments of all matrices of a model.

    Attributes:
        gradients: whether costs in these moments are estimates of the loss, comparable over all matrices.
    """

    gradients: bool

    def of_layer(self, reader: ModelReader, layer: Layer, loaded: Sequence[LoadedMatrix]) -> LayerMoments:
        """Return the moments of a layer's matrices, given the model and their weights."""

    def describe(self) -> dict[str, Any]:
        """Return what a checkpoint's recipe records of them."""


class PlainSquares:
    """No second moments: errors count by their Frobenius norm."""

    gradients = False

    def of_layer(self, reader: ModelReader, layer: Layer, loaded: Sequence[LoadedMatrix]) -> LayerMoments:
        """Return this, which knows no layer."""
        return self

    def describe(self) -> dict[str, Any]:
        """Return nothing to record."""
        return {}

    def group(self, matrix: Matrix) -> str:
        """Return one name for all."""
        return ""

    def numbers(self, matrix: Matrix) -> int:
        """Return 0."""
        return 0

    def of(self, matrices: Sequence[Matrix], device: torch.device) -> Moments:
        """Return the identity."""
        return Moments()
