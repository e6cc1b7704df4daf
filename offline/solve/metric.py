"""What an error of a matrix costs: plain squares, or weighed by the second moments of its inputs and outputs.

For y = W·x the expected squared output error of E = W - Ŵ is tr(E·R·Eᵀ), R = E[x·xᵀ]. With a second moment G of the
gradients at y it becomes tr(G·E·R·Eᵀ), a Kronecker-factored estimate of the loss that E costs. R and G are given in
full, as their diagonals, or not at all (the identity: the Frobenius norm). Where they come from is the business of
:mod:`..calibration`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import torch

from ..nouns import Moments, select_part
from .precision import fast_products

DAMPING = 0.01
"""Share of the mean diagonal that is added to a full second moment's diagonal."""
_MAX_DAMPING_STEPS = 6


@dataclass(frozen=True, eq=False)
class Metric:
    """The square roots of the moments: ``left``·``left``ᵀ = G, ``right``·``right``ᵀ = R.

    Attributes:
        left: [B, N] (diagonal), [B, N, N] (lower triangular) or None; B is 1 where all matrices share it.
        right: the same for K.
        left_inverse: left⁻¹; the loop divides by the roots hundreds of times.
        right_inverse: right⁻¹.
    """

    left: torch.Tensor | None = None
    right: torch.Tensor | None = None
    left_inverse: torch.Tensor | None = None
    right_inverse: torch.Tensor | None = None

    @cached_property
    def feedback_factor(self) -> torch.Tensor | None:
        """The upper Cholesky factor T of R⁻¹ = Tᵀ·T, [B, K, K], where R is full; what error feedback goes by."""
        if self.right is None or self.right.dim() == 2:
            return None
        return torch.linalg.cholesky(torch.cholesky_inverse(self.right), upper=True).contiguous()

    def whiten(self, error: torch.Tensor) -> torch.Tensor:
        """Return leftᵀ·E·right, whose squared Frobenius norm is the cost of E [B, N, K]."""
        with fast_products(error.device):
            if self.right is not None:
                error = error * self.right.unsqueeze(-2) if self.right.dim() == 2 else error @ self.right
            if self.left is not None:
                error = error * self.left.unsqueeze(-1) if self.left.dim() == 2 else self.left.mT @ error
        return error

    def cost(self, error: torch.Tensor) -> torch.Tensor:
        """Return tr(G·E·R·Eᵀ) of each E of a batch [B, N, K], a squared error."""
        return torch.linalg.vector_norm(self.whiten(error), dim=(-2, -1)).square()

    def color_rows(self, rows: torch.Tensor, of_inputs: bool) -> torch.Tensor:
        """Undo the whitening of rank-major factor rows: V' [B, r, K] -> V'·right⁻¹, or U' [B, r, N] -> U'·left⁻¹."""
        inverse = self.right_inverse if of_inputs else self.left_inverse
        if inverse is None:
            return rows
        return rows * inverse.unsqueeze(-2) if inverse.dim() == 2 else rows @ inverse

    def whiten_rows(self, rows: torch.Tensor, of_inputs: bool) -> torch.Tensor:
        """Return V·right [B, r, K] or U·left [B, r, N] of rank-major factor rows."""
        root = self.right if of_inputs else self.left
        if root is None:
            return rows
        return rows * root.unsqueeze(-2) if root.dim() == 2 else rows @ root

    def importance(self, of_inputs: bool) -> torch.Tensor | None:
        """Return the diagonal of R as [B, 1, K], or of G as [B, 1, N]; None for the identity."""
        root = self.right if of_inputs else self.left
        if root is None:
            return None
        return (root if root.dim() == 2 else root.norm(dim=-1)).square().unsqueeze(-2)

    def select(self, index: torch.Tensor | slice) -> Metric:
        """Return the metric of a part of the batch."""
        roots = (self.left, self.right, self.left_inverse, self.right_inverse)
        if all(root is None or len(root) == 1 for root in roots):
            return self  # and with it what has been factorized
        return Metric(*(select_part(root, index) for root in roots))


_metrics: WeakKeyDictionary[Moments, Metric] = WeakKeyDictionary()


def metric_of(moments: Moments) -> Metric:
    """Return the metric of moments, damped where they are full; what several batches share is factorized once."""
    metric = _metrics.get(moments)
    if metric is None:
        left, right = _root(moments.outputs), _root(moments.inputs)
        metric = _metrics[moments] = Metric(left, right, _inverse(left), _inverse(right))
    return metric


def _root(moment: torch.Tensor | None) -> torch.Tensor | None:
    """Return the square root of a diagonal, or the Cholesky factor of a full moment, damped until it exists."""
    if moment is None:
        return None
    if moment.dim() == 2:
        floor = moment.mean(-1, keepdim=True).clamp(min=1e-30) * DAMPING
        return (moment + floor).sqrt()
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)
    damping = DAMPING
    for _ in range(_MAX_DAMPING_STEPS):
        damped = moment.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(damping * mean.unsqueeze(-1))
        root, info = torch.linalg.cholesky_ex(damped)
        if not info.any():
            return root
        damping *= 10
    raise ValueError("a second moment is not positive semidefinite; were its activations finite?")


def _inverse(root: torch.Tensor | None) -> torch.Tensor | None:
    if root is None:
        return None
    if root.dim() == 2:
        return root.reciprocal()
    unit = torch.eye(root.shape[-1], device=root.device).expand_as(root)
    return torch.linalg.solve_triangular(root, unit, upper=False)
