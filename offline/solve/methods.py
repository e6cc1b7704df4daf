"""One entry for every method: a batch of matrices in, codes, scales, zero points and factors out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ..nouns import PLAIN_METHODS, Moments, Recipe
from .base.group import GroupQuantized, quantize_rtn
from .base.hqq import quantize_hqq
from .base.integer_zeros import with_integer_zeros
from .base.least_squares import quantize_mse
from .compensator.factors import StoredFactor, store_factor
from .compensator.low_rank import StoredPair
from .joint_loop import quantize_jointly
from .paper_loop import alternate


class Solved(NamedTuple):
    """One quantized matrix: codes [N, K], scales and zero points [N, K/g], and its factors, if it has rank."""

    base: GroupQuantized
    pair: StoredPair | None

    @property
    def rank(self) -> int:
        """The rank of the compensator."""
        return 0 if self.pair is None else self.pair.u.values.shape[-2]

    def to(self, device: torch.device) -> Solved:
        """Return the matrix on a device: itself where it is there."""
        if self.base.codes.device == device or (device.index is None and self.base.codes.device.type == device.type):
            return self
        pair = None if self.pair is None else StoredPair(*(factor.to(device) for factor in self.pair))
        return Solved(GroupQuantized(*(part.to(device) for part in self.base)), pair)

    def dequantize(self) -> torch.Tensor:
        """Return s·(q - z) + UᵀV in float32, [N, K]."""
        base = self.base.dequantize()
        return base if self.pair is None else base + self.pair.product()


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

    def one(self, index: int, rank: int) -> Solved:
        """Return the matrix at ``index`` of the batch, whose own rank is ``rank``."""
        pair = None
        if rank > 0 and self.u is not None and self.v is not None:
            pair = StoredPair(self.u.rows(index, rank), self.v.rows(index, rank))
        return Solved(GroupQuantized(*(part[index] for part in self.base)), pair)


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
    recipe = replace(recipe, group_size=recipe.group_size_for(weights.shape[-1]))
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
        base = quantizer(weights, recipe.group_size)
        base = with_integer_zeros(weights, base) if recipe.integer_zeros else base
        return _finish(weights, base, None, None, _rounds(weights, 1))
    base, real_u, real_v, rounds = alternate(weights, rank, recipe)
    stored = [store_factor(factor, recipe.factor_bits, model_dtype) for factor in (real_u, real_v)]
    return _finish(weights, base, stored[0], stored[1], rounds)


def _rounds(weights: torch.Tensor, number: int) -> torch.Tensor:
    return torch.full(weights.shape[:1], number, dtype=torch.int64, device=weights.device)


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
