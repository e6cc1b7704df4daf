"""The interface of what says what errors cost: the second moments of one layer's matrices; and of knowing nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from ..nouns import Matrix, Moments


class LayerMoments(Protocol):
    """The second moments of the matrices of one layer."""

    def group(self, matrix: Matrix) -> str:
        """Return a name that matrices must have in common to be quantized in one batch."""

    def numbers(self, matrix: Matrix) -> int:
        """Return how many numbers the moments of one more matrix of a batch take."""

    def of(self, matrices: Sequence[Matrix], device: torch.device) -> Moments:
        """Return the moments of matrices of one shape and group."""


class NoMoments:
    """Without a calibration: nothing is known of the inputs."""

    def group(self, matrix: Matrix) -> str:
        """Return one name for all."""
        return ""

    def numbers(self, matrix: Matrix) -> int:
        """Return 0."""
        return 0

    def of(self, matrices: Sequence[Matrix], device: torch.device) -> Moments:
        """Return the identity."""
        return Moments()
