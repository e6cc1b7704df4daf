"""One entry for every method, and MiLo's alternating optimization as published.

The paper's loop: quantize W - UᵀV, then fit UᵀV to the error, until neither helps.

Works on a batch of matrices of one shape; each stops by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .compensator import StoredFactor, store_factor, truncated_svd
from .hqq import quantize_hqq
from .joint import quantize_jointly
from .least_squares import quantize_mse
from .metric import Moments
from .quantizer import GroupQuantized, quantize_rtn
from .recipe import METHODS, PLAIN_METHODS, Recipe

WINDOW = 3
MIN_IMPROVEMENT = 1e-4

__all__ = ["METHODS", "Quantized", "Recipe", "quantize_matrices"]


class Quantized(NamedTuple):
    """One batch of quantized matrices; factors have the rows of the largest rank, zero beyond a matrix's own.

    ``errors`` holds ‖W - Ŵ‖/‖W‖ of each matrix with everything stored as it is stored; ``rounds`` the
    alternating rounds each took.
    """

    base: GroupQuantized
    u: StoredFactor | None
    v: StoredFactor | None
    errors: torch.Tensor
    rounds: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """Return s·(q - z) + UᵀV in float32, [B, N, K]."""
        base = self.base.dequantize()
        if self.u is None or self.v is None:
            return base
        return base + self.u.dequantize().mT @ self.v.dequantize()


@dataclass
class _Progress:
    """The stop rule (paper appendix A, eq. 14-15) of a batch: which matrices go on."""

    active: torch.Tensor
    history: list[torch.Tensor] = field(default_factory=list)

    def record(self, error: torch.Tensor) -> None:
        """Take the error of this round; stop those whose 3-round mean improved by less than 1e-4."""
        self.history.append(error)
        if len(self.history) <= WINDOW:
            return
        before = torch.stack(self.history[-WINDOW - 1 : -1]).mean(0)
        now = torch.stack(self.history[-WINDOW:]).mean(0)
        self.active = self.active & ((before - now) / before.clamp(min=1e-30) >= MIN_IMPROVEMENT)


def quantize_matrices(
    weights: torch.Tensor,
    rank: int | Sequence[int],
    recipe: Recipe,
    model_dtype: torch.dtype,
    moments: Moments | None = None,
) -> Quantized:
    """Quantize a batch of matrices of one shape.

    Args:
        weights: float32 [B, N, K].
        rank: compensator rank; 0 for none. Method ``milo`` also takes one for each matrix, none or all of them 0.
        recipe: method, group size, factor bits, rounds, seed.
        model_dtype: the model's dtype, in which 16-bit factors are stored.
        moments: what errors cost (method ``milo`` only); None for plain squares.

    Raises:
        ScaleError: a group's scale does not fit fp16.
        ValueError: ranks that this method cannot take together.
    """
    if recipe.method == "milo":
        ranks = [rank] * len(weights) if isinstance(rank, int) else rank
        state = quantize_jointly(weights, ranks, moments or Moments(), recipe, model_dtype)
        rounds = _rounds(weights, recipe.max_rounds if any(ranks) else 1)
        u, v = (state.pair.u, state.pair.v) if state.pair else (None, None)
        return _finish(weights, state.base, u, v, rounds)
    if not isinstance(rank, int):
        raise ValueError(f"method {recipe.method} takes batches of one rank")
    if recipe.method in PLAIN_METHODS or rank == 0:
        quantizer = {"rtn": quantize_rtn, "mse": quantize_mse}.get(recipe.method, quantize_hqq)
        return _finish(weights, quantizer(weights, recipe.group_size), None, None, _rounds(weights, 1))
    base, real_u, real_v, rounds = _alternate(weights, rank, recipe)
    stored = [store_factor(factor, recipe.factor_bits, model_dtype) for factor in (real_u, real_v)]
    return _finish(weights, base, stored[0], stored[1], rounds)


def _rounds(weights: torch.Tensor, number: int) -> torch.Tensor:
    return torch.full(weights.shape[:1], number, dtype=torch.int64, device=weights.device)


def _alternate(
    weights: torch.Tensor, rank: int, recipe: Recipe
) -> tuple[GroupQuantized, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the alternating rounds; each matrix keeps the state of the round it stopped in."""
    generator = torch.Generator(weights.device).manual_seed(recipe.seed)
    batch, n, k = weights.shape
    u = weights.new_zeros(batch, rank, n)
    v = weights.new_zeros(batch, rank, k)
    rounds = torch.zeros(batch, dtype=torch.int64, device=weights.device)
    progress = _Progress(torch.ones(batch, dtype=torch.bool, device=weights.device))
    base: GroupQuantized | None = None
    for _ in range(recipe.max_rounds):
        active = progress.active
        fresh = quantize_hqq(weights - u.mT @ v, recipe.group_size)
        base = fresh if base is None else _merge(base, fresh, active)
        residual = weights - base.dequantize()
        new_u, new_v = truncated_svd(residual, rank, generator)
        keep = active[:, None, None]
        u, v = torch.where(keep, new_u, u), torch.where(keep, new_v, v)
        rounds += active
        progress.record((residual - u.mT @ v).flatten(1).norm(dim=1))
        if not progress.active.any():
            break
    assert base is not None
    return base, u, v, rounds


def _merge(old: GroupQuantized, new: GroupQuantized, active: torch.Tensor) -> GroupQuantized:
    keep = active[:, None, None]
    return GroupQuantized(*(torch.where(keep, b, a) for a, b in zip(old, new, strict=True)))


def _finish(
    weights: torch.Tensor,
    base: GroupQuantized,
    u: StoredFactor | None,
    v: StoredFactor | None,
    rounds: torch.Tensor,
) -> Quantized:
    result = Quantized(base, u, v, torch.empty(0), rounds)
    difference = (weights - result.dequantize()).flatten(1).norm(dim=1)
    size = weights.flatten(1).norm(dim=1)
    return result._replace(errors=torch.where(size > 0, difference / size.clamp(min=1e-30), difference))
