"""Second moments of a model's activations and gradients on a calibration text, by matrix.

For every matrix: Σ x·xᵀ of its inputs, and the mean of g·gᵀ, g the gradient of the text's log-likelihood at its
outputs, with labels drawn from the model itself (the Fisher information). tr(G·E·R·Eᵀ) then estimates what an error E
costs in loss, on one scale for all matrices of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import ConversionError
from ..nouns import LoadedMatrix, Matrix, Moments
from ..source.layers import Layer
from ..source.reader import ModelReader
from .moment_source import MAX_FULL_SIZE, moment_numbers

UNSEEN = 1e-12
"""Second moment of what the text never reaches, so that such an expert is still quantized by plain squares."""
PRIOR_TOKENS = 1.0
"""Correlations are shrunk as if so many times K tokens of uncorrelated inputs had been seen beside the real ones."""


class Moment:
    """A running Σ a·aᵀ (or its diagonal) over rows a, with their number."""

    def __init__(self, size: int) -> None:
        self.full = size <= MAX_FULL_SIZE
        self.rows = 0
        self.total: torch.Tensor | None = None
        self.size = size

    def add(self, rows: torch.Tensor) -> None:
        """Add rows [T, size]."""
        rows = rows.detach().reshape(-1, self.size).float()
        update = rows.mT @ rows if self.full else rows.square().sum(0)
        self.total = update if self.total is None else self.total.add_(update)
        self.rows += rows.shape[0]

    def shrunk(self, device: torch.device) -> torch.Tensor:
        """Return Σ a·aᵀ with correlations shrunk, [size, size] or [size]; the identity's share where none was seen."""
        if self.total is None:
            unseen = torch.full((self.size,), UNSEEN, device=device)
            return unseen.diag_embed() if self.full else unseen
        total = self.total.to(device)
        if not self.full:
            return total
        keep = self.rows / (self.rows + PRIOR_TOKENS * self.size)
        return total * keep + torch.diag_embed(total.diagonal()) * (1 - keep)


class Calibration:
    """The moments of every matrix of a model; see :func:`calibrate`.

    Attributes:
        inputs: of each matrix, by name.
        outputs: of the gradients at its outputs; never filled without ``gradients``.
        tokens: of the text.
        own_text: whether the model wrote the text.
        gradients: whether the costs of errors are those of the loss, comparable over all matrices; without, they are
            squared output errors.
    """

    def __init__(self, gradients: bool = True) -> None:
        self.inputs: dict[str, Moment] = {}
        self.outputs: dict[str, Moment] = {}
        self.tokens = 0
        self.own_text = False
        self.gradients = gradients

    def of_layer(self, reader: ModelReader, layer: Layer, loaded: Sequence[LoadedMatrix]) -> Calibration:
        """Return this, which knows all layers."""
        return self

    def group(self, matrix: Matrix) -> str:
        """Return one name for all: each matrix has its own moments."""
        return ""

    def numbers(self, matrix: Matrix) -> int:
        """Return the numbers in the moments of a matrix, on both sides."""
        sides = (matrix.k, matrix.n) if self.gradients else (matrix.k,)
        return sum(map(moment_numbers, sides))

    def describe(self) -> dict[str, Any]:
        """Return what a checkpoint's recipe records."""
        return {
            "calibration": "self" if self.own_text else "text",
            "calibration_tokens": self.tokens,
            "calibration_moments": "full" if self.gradients else "inputs",
        }

    def of(self, matrices: Sequence[Matrix], device: torch.device) -> Moments:
        """Return the moments of matrices of one shape, stacked, per token of the text; no outputs without gradients.

        Raises:
            ConversionError: the model never ran one of them.
        """
        inputs, outputs = [], []
        for matrix in matrices:
            if matrix.name not in self.inputs:
                raise ConversionError(f"{matrix.name}: the calibration found no such module in the model")
            inputs.append(self.inputs[matrix.name].shrunk(device) / max(1, self.tokens))
            if self.gradients:
                outputs.append(self.outputs[matrix.name].shrunk(device) / max(1, self.outputs[matrix.name].rows))
        return Moments(torch.stack(inputs), torch.stack(outputs) if self.gradients else None)

    def move(self, prefix: str, device: torch.device) -> None:
        """Move the moments of the matrices whose names begin with ``prefix``."""
        for name, moment in self.inputs.items():
            if name.startswith(prefix) and moment.total is not None:
                moment.total = moment.total.to(device)

    def record(self, name: str, inputs: Moment, outputs: torch.Tensor) -> None:
        """Take the inputs of a matrix, which others may share, and watch for the gradient at its outputs."""
        self.inputs.setdefault(name, inputs)
        moment = self.outputs.setdefault(name, Moment(outputs.shape[-1]))
        if outputs.requires_grad:
            outputs.register_hook(moment.add)
