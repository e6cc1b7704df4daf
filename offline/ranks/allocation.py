"""Ranks under a byte budget: where a byte of compensator removes most of the expected loss.

Every matrix gets a curve, its expected cost at each rank, from two measured spectra: of the base's residual W - Q and
of W itself. The lower convex hulls of all curves are merged, steepest first, until the budget is spent.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from ..errors import ConversionError
from ..nouns import RANK_MULTIPLE, Matrix, Moments, Recipe
from ..solve.base.least_squares import quantize_mse
from ..solve.compensator.factors import EXACT_SIZE
from ..solve.compensator.low_rank import leading_rows
from ..solve.metric import metric_of
from .budget import base_bits, rank_bits

LARGEST_SHARE = 0.5
"""No rank above this share of the smaller side: there the factors cost more than the weights."""
RESIDUAL_POWER = 1.8
"""The loop gets further than the residual's spectrum says, since the base adapts: measured on trained MoEs, the cost
falls about as the 1.8th power of what one SVD leaves."""


class Curve(NamedTuple):
    """The expected cost of a matrix at ranks 0, 8, 16, …: ``costs[i]`` at rank 8·i."""

    costs: list[float]


def measure_curves(weights: torch.Tensor, recipe: Recipe, moments: Moments, relative: bool = True) -> list[Curve]:
    """Return the expected cost of each matrix of a batch [B, N, K] at every rank, in the metric of its moments.

    Costs are ``relative`` to those of leaving the matrix out; without, they are the costs themselves, which are
    comparable over all matrices of a model where both moments are given.
    """
    metric = metric_of(moments)
    base = quantize_mse(weights, recipe.group_size, metric.importance(of_inputs=True))
    residual = metric.whiten(weights - base.dequantize())
    whole = metric.whiten(weights)
    generator = torch.Generator(weights.device).manual_seed(recipe.seed)
    error = residual.flatten(1).square().sum(1)
    size = whole.flatten(1).square().sum(1).clamp(min=1e-30)
    scale = error / size if relative else error
    left = _tails(residual, error, generator)
    signal = _tails(whole, size, generator)
    expected = torch.minimum(left**RESIDUAL_POWER, signal * left ** (RESIDUAL_POWER - 1))
    return [Curve(costs) for costs in (scale.unsqueeze(-1) * expected).tolist()]


def allocate(
    matrices: Sequence[Matrix], curves: Mapping[str, Curve], budget_bits: float, recipe: Recipe
) -> dict[str, int]:
    """Return ranks of least total cost whose stored bits average at most ``budget_bits`` over all weights.

    Raises:
        ConversionError: the budget does not even pay for the codes, scales and zero points.
    """
    weights = sum(matrix.n * matrix.k for matrix in matrices)
    budget = (budget_bits - base_bits(recipe.group_size)) * weights
    if budget < 0:
        raise ConversionError(
            f"--budget-bits {budget_bits:g}: codes, scales and zero points of group size {recipe.group_size} take "
            f"{base_bits(recipe.group_size):g} bits a weight already; raise the budget or --group-size"
        )
    ranks = dict.fromkeys((matrix.name for matrix in matrices), 0)
    prices = {m.name: rank_bits(m, recipe.factor_bits) * RANK_MULTIPLE for m in matrices}
    hulls = {name: _hull(curve.costs) for name, curve in curves.items()}
    queue: list[tuple[float, str, int]] = []

    def offer(name: str, position: int) -> None:
        """Put the next step of a matrix's hull into the queue, by cost removed per bit."""
        hull = hulls[name]
        if position + 1 < len(hull):
            (here, cost), (there, lower) = hull[position], hull[position + 1]
            heapq.heappush(queue, (-(cost - lower) / ((there - here) * prices[name]), name, position + 1))

    for matrix in matrices:
        offer(matrix.name, 0)
    while queue:
        _, name, position = heapq.heappop(queue)
        here, there = hulls[name][position - 1][0], hulls[name][position][0]
        affordable = min(there - here, int(budget / prices[name] + 1e-9))
        ranks[name] += affordable * RANK_MULTIPLE
        budget -= affordable * prices[name]
        if affordable == there - here:
            offer(name, position)
    return ranks


def _tails(matrix: torch.Tensor, total: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the share of the squared norm beyond the leading 0, 8, 16, … singular values, [B, steps]."""
    smaller = min(matrix.shape[-2:])
    most = max(RANK_MULTIPLE, int(smaller * LARGEST_SHARE) // RANK_MULTIPLE * RANK_MULTIPLE)
    if matrix.shape[-2] < matrix.shape[-1]:
        matrix = matrix.mT
    if smaller <= EXACT_SIZE:
        squares = _eigenvalues(matrix.mT @ matrix)[..., :most]
    else:
        most = most // 4 // RANK_MULTIPLE * RANK_MULTIPLE
        _, right = leading_rows(matrix, most, generator)
        squares = _eigenvalues(right @ right.mT)
    steps = squares.unflatten(-1, (-1, RANK_MULTIPLE)).sum(-1).cumsum(-1)
    shares = 1 - steps / total.clamp(min=1e-30).unsqueeze(-1)
    return torch.cat([torch.ones_like(shares[..., :1]), shares.clamp(min=0)], -1)


def _eigenvalues(moment: torch.Tensor) -> torch.Tensor:
    """Return the eigenvalues of Gram matrices [..., r, r], falling.

    In float64, since cuSOLVER takes a third of the time for it (512 x 512): for float32 it goes by Jacobi rotations.
    """
    return torch.linalg.eigvalsh(moment.double()).float().clamp(min=0).flip(-1)


def _hull(costs: Sequence[float]) -> list[tuple[int, float]]:
    """Return the corners (step, cost) of the lower convex hull of a falling curve."""
    hull: list[tuple[int, float]] = []
    for step, cost in enumerate(costs):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], (step, cost)):
            hull.pop()
        hull.append((step, cost))
    return hull


def _slope(first: tuple[int, float], second: tuple[int, float]) -> float:
    return (second[1] - first[1]) / (second[0] - first[0])
