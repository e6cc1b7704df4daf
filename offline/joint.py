"""The improved alternating loop: base and compensator each fitted to the other as stored.

The paper quantizes the factors once, after the loop, and nothing makes up for their error. Here the base always
quantizes W minus the *stored* compensator and the compensator is always fitted to the error of the *stored* base, in
the metric of the second moments if there are any. The best state seen is what counts, so more rounds never hurt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .compensator import StoredFactor
from .error_feedback import feedback_factor, quantize_with_feedback
from .least_squares import FITS as COLD_FITS
from .least_squares import quantize_mse
from .low_rank import StoredPair, leading_rows, store_pair
from .metric import Metric, Moments
from .quantizer import GroupQuantized, refuse_bad_scales
from .recipe import Recipe

WARM_FITS = 2
"""Regressions of a base that goes on from the round before."""
RELAXATION = 1.5
"""The compensator is fitted to C + 1.5·(E - C), C the last one and E the base's error: a step past the paper's, which
gets further in the same rounds; the first and the last round take the plain step."""


BaseQuantizer = Callable[[torch.Tensor, GroupQuantized | None], GroupQuantized]
"""Weights [B, N, K] and the result of the round before, or None, to codes and grids."""


@dataclass
class State:
    """Base and compensator of a batch, with the cost of what they leave; the compensator is None at rank 0."""

    base: GroupQuantized
    pair: StoredPair | None
    cost: torch.Tensor


def quantize_jointly(weights: torch.Tensor, rank: int, moments: Moments, recipe: Recipe, dtype: torch.dtype) -> State:
    """Quantize a batch of matrices with compensators of one rank.

    Args:
        weights: float32 [B, N, K].
        rank: compensator rank; 0 for none.
        moments: what errors cost; see :mod:`.metric`.
        recipe: group size, factor bits, rounds, seed.
        dtype: the model's dtype, in which 16-bit factors are stored.

    Two beginnings compete in each matrix: no compensator, as in the paper, and the leading part of W itself, which
    wins where W is nearly of low rank (attention's queries and keys).

    Returns:
        The best state seen.
    """
    refuse_bad_scales(weights, recipe.group_size)
    metric = Metric.of(moments)
    if rank == 0:
        return State(_base_quantizer(metric, recipe)(weights, None), None, torch.empty(0))
    zeros = torch.zeros_like(weights)
    best = _alternate(weights, zeros, rank, metric, recipe, dtype)
    return _better(
        best, _alternate(weights, _low_rank_part(weights, rank, metric, recipe, dtype), rank, metric, recipe, dtype)
    )


def _base_quantizer(metric: Metric, recipe: Recipe) -> BaseQuantizer:
    """Return the quantizer for a metric: with error feedback where the inputs' second moment is full."""
    if metric.right is not None and metric.right.dim() == 3:
        factor = feedback_factor(metric.right)

        def with_feedback(weights: torch.Tensor, start: GroupQuantized | None) -> GroupQuantized:
            return quantize_with_feedback(
                weights, recipe.group_size, factor, start, COLD_FITS if start is None else WARM_FITS
            )

        return with_feedback
    importance = metric.importance(of_inputs=True)

    def plain(weights: torch.Tensor, start: GroupQuantized | None) -> GroupQuantized:
        fits = COLD_FITS if start is None else WARM_FITS
        return quantize_mse(weights, recipe.group_size, importance, start, fits, strict=False)

    return plain


def _low_rank_part(
    weights: torch.Tensor, rank: int, metric: Metric, recipe: Recipe, dtype: torch.dtype
) -> torch.Tensor:
    """Return the best compensator of the whole W, before anything is quantized."""
    generator = torch.Generator(weights.device).manual_seed(recipe.seed)
    whitened = metric.whiten(weights)
    left, _ = leading_rows(whitened, rank, generator)
    return store_pair(weights, whitened, left, metric, recipe.factor_bits, dtype).product()


def _alternate(
    weights: torch.Tensor, compensator: torch.Tensor, rank: int, metric: Metric, recipe: Recipe, dtype: torch.dtype
) -> State:
    """Alternate from a first compensator [B, N, K]; return the best state of each matrix."""
    quantize = _base_quantizer(metric, recipe)
    generator = torch.Generator(weights.device).manual_seed(recipe.seed)
    base = quantize(weights - compensator, None)
    best: State | None = None
    start: torch.Tensor | None = None
    for step in range(recipe.max_rounds):
        target = weights - base.dequantize()
        if 0 < step < recipe.max_rounds - 1:
            target = torch.lerp(compensator, target, RELAXATION)
        whitened = metric.whiten(target)
        left, start = leading_rows(whitened, rank, generator, start)
        pair = store_pair(target, whitened, left, metric, recipe.factor_bits, dtype)
        compensator = pair.product()
        rest = weights - compensator
        base = quantize(rest, base)
        state = State(base, pair, metric.cost(rest - base.dequantize()))
        best = state if best is None else _better(best, state)
    assert best is not None
    return best


def _better(old: State, new: State) -> State:
    """Return the cheaper state of each matrix."""
    take = (new.cost < old.cost)[:, None, None]

    def choose(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.where(take, b, a)

    base = GroupQuantized(*(choose(a, b) for a, b in zip(old.base, new.base, strict=True)))
    if old.pair is None or new.pair is None:
        raise ValueError("states to compare need compensators of one rank")
    pair = StoredPair(*(_choose_factor(a, b, take) for a, b in zip(old.pair, new.pair, strict=True)))
    return State(base, pair, torch.minimum(old.cost, new.cost))


def _choose_factor(old: StoredFactor, new: StoredFactor, take: torch.Tensor) -> StoredFactor:
    values = torch.where(take, new.values, old.values)
    if old.scale is None or new.scale is None:
        return StoredFactor(values, None)
    return StoredFactor(values, torch.where(take, new.scale, old.scale))
