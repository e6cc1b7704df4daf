"""Low-rank factors that go back into the loop: best in a metric, fitted again to what their storage makes of them.

Every step is matrix products, Cholesky factorizations of r x r and triangular solves, batched over matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vllm_milo.checkpoint import COMPENSATOR_GROUP_SIZE
from vllm_milo.kernels.packing import MAX_CODE

from ..metric import Metric
from ..precision import fast_products
from .factors import FACTOR_ZERO, MIN_SCALE, StoredFactor, store_factor
from .orthonormal import damped_cholesky, gram, orthonormal_rows

POWER_ITERATIONS = 3
"""Of the first round; later ones go on from the round before."""
CLIPS = (1.0, 0.8)
STEP = 2 / 7
"""A step of the codes, where the largest value of a group has the last of them (paper eq. 13)."""
FITS = 3
REFITS = 2


class StoredPair(NamedTuple):
    """Stored factors of a batch: U [B, r, N] and V [B, r, K]."""

    u: StoredFactor
    v: StoredFactor

    def product(self) -> torch.Tensor:
        """Return UᵀV in float32, [B, N, K]; to the bit the same for factors that were stored and read again."""
        u, v = (factor.dequantize().contiguous() for factor in self)  # products depend on the layout in memory
        return u.mT @ v


def leading_rows(
    matrix: torch.Tensor, rank: int, generator: torch.Generator, start: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return U [B, r, N], orthonormal rows, and V = U·matrix [B, r, K] near the best of rank ``rank``.

    Subspace iteration with Cholesky QR: one step from ``start``, or more from a random sketch.

    Args:
        matrix: float32 [B, N, K].
        rank: r.
        generator: source of the sketch, on the matrix's device.
        start: rows [B, r, K] that span about the right space.
    """
    right = start
    if right is None:
        # one sketch for all, so that a matrix's result does not depend on its place in the batch
        right = torch.randn(rank, matrix.shape[-1], generator=generator, device=matrix.device, dtype=matrix.dtype)
        right = right.expand(*matrix.shape[:-2], -1, -1)
    with fast_products(matrix.device):
        for _ in range(POWER_ITERATIONS if start is None else 0):
            right = orthonormal_rows(orthonormal_rows(right @ matrix.mT) @ matrix)
        left = orthonormal_rows(right @ matrix.mT)
        return left, left @ matrix


def store_pair(
    whitened: torch.Tensor, right: torch.Tensor, metric: Metric, bits: int, dtype: torch.dtype
) -> StoredPair:
    """Store factors of a residual near the whitened ones, each fitted again to the other as stored.

    Args:
        whitened: the residual in the metric, float32 [B, N, K].
        right: V' [B, r, K] of :func:`leading_rows` of it.
        metric: what errors cost.
        bits: 3, 8 or 16.
        dtype: dtype of 16-bit factors.
    """
    with fast_products(whitened.device):
        return _store_pair(whitened, right, metric, bits, dtype)


def _store_pair(
    whitened: torch.Tensor, right: torch.Tensor, metric: Metric, bits: int, dtype: torch.dtype
) -> StoredPair:
    size = right.norm(dim=-1, keepdim=True).clamp(min=1e-30).sqrt()
    v = _store(metric.color_rows(right / size, of_inputs=True), bits, dtype, metric.importance(of_inputs=True))
    for refit in range(REFITS):
        right = metric.whiten_rows(v.dequantize(), of_inputs=True)
        # least squares: U' = (V'·V'ᵀ)⁻¹·V'·E'ᵀ
        left = _solve(right, right @ whitened.mT)
        u = _store(metric.color_rows(left, of_inputs=False), bits, dtype, metric.importance(of_inputs=False))
        if refit + 1 < REFITS:
            left = metric.whiten_rows(u.dequantize(), of_inputs=False)
            right = _solve(left, left @ whitened)
            v = _store(metric.color_rows(right, of_inputs=True), bits, dtype, metric.importance(of_inputs=True))
    return StoredPair(u, v)


def pad_pair(pair: StoredPair, rank: int) -> StoredPair:
    """Return factors with rows of zeros added up to ``rank``."""
    return StoredPair(*(_pad(factor, rank) for factor in pair))


def join_pairs(pairs: Sequence[StoredPair]) -> StoredPair:
    """Return batches of factors of one rank as one batch."""
    if len(pairs) == 1:
        return pairs[0]
    return StoredPair(*(_join(factors) for factors in zip(*pairs, strict=True)))


def _pad(factor: StoredFactor, rank: int) -> StoredFactor:
    rows = (0, 0, 0, rank - factor.values.shape[-2])
    zero = FACTOR_ZERO if factor.values.dtype == torch.uint8 else 0
    scale = None if factor.scale is None else torch.nn.functional.pad(factor.scale, rows, value=1.0)
    return StoredFactor(torch.nn.functional.pad(factor.values, rows, value=zero), scale)


def _join(factors: Sequence[StoredFactor]) -> StoredFactor:
    scales = [factor.scale for factor in factors if factor.scale is not None]
    return StoredFactor(torch.cat([factor.values for factor in factors]), torch.cat(scales) if scales else None)


def _store(factor: torch.Tensor, bits: int, dtype: torch.dtype, importance: torch.Tensor | None) -> StoredFactor:
    """Store one factor with the scale of each 64 values fitted by least squares (3 bits), else as published."""
    if bits != 3:
        return store_factor(factor, bits, dtype)
    if factor.is_cuda:
        from vllm_milo.kernels.convert import factor_fit

        clips = (CLIPS[0] * STEP, CLIPS[1] * STEP)
        return StoredFactor(
            *factor_fit.store_factor(factor, importance, clips, FITS, MIN_SCALE, (FACTOR_ZERO, MAX_CODE))
        )
    groups = factor.unflatten(-1, (-1, COMPENSATOR_GROUP_SIZE))
    weight = None if importance is None else importance.unflatten(-1, (-1, COMPENSATOR_GROUP_SIZE))
    largest = groups.abs().amax(-1)
    best_error: torch.Tensor | None = None
    best = largest
    for clip in CLIPS:
        scale = (largest * (clip * STEP)).clamp(min=MIN_SCALE).half()
        for fit in range(FITS):
            steps = _steps(groups, scale)
            error = _weigh((groups - steps * scale.float().unsqueeze(-1)).square(), weight)
            if best_error is None:
                best, best_error = scale, error
            best = torch.where(error < best_error, scale, best)
            best_error = torch.minimum(error, best_error)
            if fit + 1 < FITS:
                fitted = _weigh(groups * steps, weight) / _weigh(steps.square(), weight).clamp(min=1e-30)
                scale = torch.where(fitted > MIN_SCALE, fitted, scale.float()).half()
    return StoredFactor((_steps(groups, best) + FACTOR_ZERO).to(torch.uint8).flatten(-2), best)


def _steps(groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (groups / scale.float().unsqueeze(-1)).round_().clamp_(-FACTOR_ZERO, 7 - FACTOR_ZERO)


def _weigh(values: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    return values.sum(-1) if weight is None else (values * weight).sum(-1)


def _solve(rows: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return (rows·rowsᵀ)⁻¹·target for rows [B, r, C] and target [B, r, D]."""
    return torch.cholesky_solve(target, damped_cholesky(gram(rows)))
