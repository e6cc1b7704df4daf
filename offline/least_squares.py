"""The ``mse`` quantizer: scale and zero point of every group by alternating least squares.

HQQ moves the zero point alone and leaves the scale at the group's range. Here both are fitted: given the codes, the
best scale and zero point are a linear regression of the weights on their codes; given those, the best codes are
the nearest. Alternating the two never raises the squared error, so the fit starts from several clipped ranges (or
from the grid of an earlier round) and the best end counts. Every candidate is measured as it would be stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .quantizer import MAX_CODE, MAX_SCALE, MIN_SCALE, GroupQuantized, min_max

CLIPS = (1.0, 0.86, 0.72)
"""Shares of a group's range that the fits start from."""
FITS = 4
"""Regressions of each start."""


class Grid(NamedTuple):
    """The affine grid of each group: fp16 scale and zero point, [..., G]."""

    scale: torch.Tensor
    zero: torch.Tensor


def quantize_mse(
    weights: torch.Tensor,
    group_size: int,
    importance: torch.Tensor | None = None,
    start: GroupQuantized | None = None,
    fits: int = FITS,
    strict: bool = True,
) -> GroupQuantized:
    """Minimize the (weighted) squared error of each group over its scale, zero point and codes.

    Args:
        weights: float32 [..., N, K].
        group_size: consecutive weights of a row that share one scale and zero point; divides K.
        importance: weights of the squared errors, float32, broadcastable to [..., N, K] and not negative; None
            weighs all alike. With E[x²] of the inputs, [..., 1, K], it is the diagonal of the output error.
        start: an earlier result for similar weights, to go on from instead of the clipped ranges.
        fits: regressions of each start.
        strict: refuse matrices so small that fp16 scales lose them; off for what a compensator leaves.

    Raises:
        ScaleError: a group's range does not fit fp16.
    """
    old = None if start is None else Grid(start.scale, start.zero)
    grid = fit_grid(weights, group_size, importance, old, fits, strict)
    return encode(weights.unflatten(-1, (-1, group_size)), grid)


def fit_grid(
    weights: torch.Tensor,
    group_size: int,
    importance: torch.Tensor | None = None,
    start: Grid | None = None,
    fits: int = FITS,
    strict: bool = False,
) -> Grid:
    """Return the grid that :func:`quantize_mse` finds for each group."""
    groups = weights.unflatten(-1, (-1, group_size))
    share = None if importance is None else _shares(importance, group_size)
    best = Grid(*min_max(groups, strict))
    error: torch.Tensor | None = None
    for grid in _clipped(best) if start is None else [start]:
        best, error = _fit(groups, share, grid, best, error, fits)
    return best


def encode(groups: torch.Tensor, grid: Grid) -> GroupQuantized:
    """Return the nearest codes of groups [..., G, g] on a grid."""
    return GroupQuantized(nearest_codes(groups, grid).to(torch.uint8).flatten(-2), grid.scale, grid.zero)


def nearest_codes(groups: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the codes 0..7, as floats, nearest to ``groups`` [..., G, g] on the stored grid."""
    codes = groups / grid.scale.float().unsqueeze(-1)
    return codes.add_(grid.zero.float().unsqueeze(-1)).round_().clamp_(0, MAX_CODE)


def regress(groups: torch.Tensor, codes: torch.Tensor, share: torch.Tensor | None, old: Grid) -> Grid:
    """Return the grid that fits ``groups`` best for these codes, as stored; ``old`` where codes are all alike.

    Args:
        groups: float32 [..., G, g].
        codes: float32 [..., G, g].
        share: weights that sum to 1 in each group, or None for equal ones.
        old: the grid that the codes come from.
    """
    mean_code, mean = _mean(codes, share), _mean(groups, share)
    covariance = _mean(codes * groups, share) - mean_code * mean
    variance = _mean(codes.square(), share) - mean_code.square()
    scale = covariance / variance.clamp(min=1e-6)
    usable = (variance > 1e-4) & (scale >= MIN_SCALE) & (scale <= MAX_SCALE)
    stored = torch.where(usable, scale, old.scale.float()).half()
    zero = (mean_code - mean / stored.float()).clamp(-MAX_SCALE, MAX_SCALE).half()
    return Grid(stored, torch.where(usable, zero, old.zero))


def _fit(
    groups: torch.Tensor,
    share: torch.Tensor | None,
    grid: Grid,
    best: Grid,
    best_error: torch.Tensor | None,
    fits: int,
) -> tuple[Grid, torch.Tensor]:
    """Alternate codes and regressions from ``grid``; return the best grid seen, ``best`` included."""
    if best_error is None:
        best_error = _error(groups, nearest_codes(groups, best), share, best)
    for step in range(fits + 1):
        codes = nearest_codes(groups, grid)
        error = _error(groups, codes, share, grid)
        better = error < best_error
        best = Grid(*(torch.where(better, new, old) for new, old in zip(grid, best, strict=True)))
        best_error = torch.where(better, error, best_error)
        if step < fits:
            grid = regress(groups, codes, share, grid)
    return best, best_error


def _error(groups: torch.Tensor, codes: torch.Tensor, share: torch.Tensor | None, grid: Grid) -> torch.Tensor:
    values = (codes - grid.zero.float().unsqueeze(-1)).mul_(grid.scale.float().unsqueeze(-1))
    return _mean(values.sub_(groups).square_(), share)


def _mean(values: torch.Tensor, share: torch.Tensor | None) -> torch.Tensor:
    return values.mean(-1) if share is None else (values * share).sum(-1)


def _shares(importance: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return importances as shares of their group; a group without any counts all alike."""
    groups = importance.unflatten(-1, (-1, group_size))
    total = groups.sum(-1, keepdim=True)
    return torch.where(total > 0, groups / total.clamp(min=1e-30), 1.0 / group_size)


def _clipped(grid: Grid, clips: Sequence[float] = CLIPS) -> list[Grid]:
    """Return grids of shrunken range around the same middle."""
    middle = MAX_CODE / 2
    found = []
    for clip in clips:
        scale = (grid.scale.float() * clip).clamp(min=MIN_SCALE).half()
        # the middle of the range, s·(3.5 - z), stays
        zero = middle - (middle - grid.zero.float()) * grid.scale.float() / scale.float()
        found.append(Grid(scale, zero.clamp(-MAX_SCALE, MAX_SCALE).half()))
    return found
