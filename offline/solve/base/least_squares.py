"""The ``mse`` quantizer: scale and zero point of every group by alternating least squares.

HQQ moves the zero point alone and leaves the scale at the group's range. Here both are fitted: given the codes, the
best scale and zero point are a linear regression of the weights on their codes; given those, the best codes are
the nearest. Alternating the two never raises the squared error, so the fit starts from several clipped ranges (or
from the grid of an earlier round) and the best end counts. Every candidate is measured as it would be stored.
On GPUs two kernels do what reads the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vllm_milo.kernels.packing import MAX_CODE

from .group import MAX_SCALE, MIN_SCALE, GroupQuantized, encode, min_max

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
) -> GroupQuantized:
    """Minimize the (weighted) squared error of each group over its scale, zero point and codes.

    Args:
        weights: float32 [..., N, K]; on GPUs [B, N, K].
        group_size: consecutive weights of a row that share one scale and zero point; divides K.
        importance: weights of the squared errors, float32, broadcastable to [..., N, K] and not negative; None
            weighs all alike. With E[x²] of the inputs, [..., 1, K], it is the diagonal of the output error; on GPUs
            that is the only shape.
        start: an earlier result for similar weights, to go on from instead of the clipped ranges.
        fits: regressions of each start.

    Raises:
        ScaleError: a group's range does not fit fp16.
    """
    old = None if start is None else Grid(start.scale, start.zero)
    grid = fit_grid(weights, group_size, importance, old, fits)
    return _encode_near(weights, grid)


def fit_grid(
    weights: torch.Tensor,
    group_size: int,
    importance: torch.Tensor | None = None,
    start: Grid | None = None,
    fits: int = FITS,
) -> Grid:
    """Return the grid that :func:`quantize_mse` finds for each group: the best of all that the fits go through."""
    fitter = _Fitter(weights, group_size, importance)
    best = Grid(*min_max(weights.unflatten(-1, (-1, group_size))))
    score = fitter.score(best, fitter.measure(best))
    for grid in _clipped(best) if start is None else [start]:
        for step in range(fits + 1):
            codes = fitter.measure(grid)
            found = fitter.score(grid, codes)
            better = found < score
            best = Grid(*(torch.where(better, new, old) for new, old in zip(grid, best, strict=True)))
            score = torch.minimum(found, score)
            if step < fits:
                grid = fitter.regress(grid, codes)
    return best


def refit(
    weights: torch.Tensor,
    old: GroupQuantized,
    group_size: int,
    importance: torch.Tensor | None,
    fits: int,
    work: Sequence[torch.Tensor],
) -> GroupQuantized:
    """Go on from the grids of an earlier result for similar weights: codes and regressions, ``fits`` times.

    The fast path of a loop: nothing of the weights' size is allocated but the codes, and errors are not compared,
    since neither step raises them (but for the rounding of the grid to fp16).

    Args:
        weights: float32 [..., N, K].
        old: the earlier result.
        group_size: as in :func:`quantize_mse`.
        importance: as in :func:`quantize_mse`.
        fits: regressions.
        work: tensors like the weights, overwritten: two on CPUs; a GPU overwrites none.
    """
    fitter = _Fitter(weights, group_size, importance, work)
    grid = Grid(old.scale, old.zero)
    for _ in range(fits):
        grid = fitter.regress(grid, fitter.measure(grid))
    return _encode_near(weights, grid, work[0])


def _encode_near(weights: torch.Tensor, grid: Grid, work: torch.Tensor | None = None) -> GroupQuantized:
    """Return the nearest codes of weights [..., N, K] on a grid; ``work``, a tensor like them, may be overwritten."""
    if weights.is_cuda:
        return encode(weights, *grid)
    groups = weights.unflatten(-1, (grid.scale.shape[-1], -1))
    out = None if work is None else work.view(groups.shape)
    return GroupQuantized(_nearest_codes(groups, grid, out).to(torch.uint8).flatten(-2), *grid)


def _nearest_codes(groups: torch.Tensor, grid: Grid, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return the codes 0..7, as floats, nearest to ``groups`` [..., G, g] on the stored grid, in ``out`` if given."""
    inverse = grid.scale.float().reciprocal().unsqueeze(-1)
    return torch.addcmul(grid.zero.float().unsqueeze(-1), groups, inverse, out=out).round_().clamp_(0, MAX_CODE)


class _CodeMoments(NamedTuple):
    """Means over each group, [..., G]: of the codes, their variance, and their covariance with the weights."""

    mean: torch.Tensor
    variance: torch.Tensor
    covariance: torch.Tensor


class _Fitter:
    """Codes and regressions of the groups of some weights [..., N, K], on CPUs in two work tensors like them.

    Args:
        weights: float32 [..., N, K].
        group_size: divides K.
        importance: weights of the squared errors, broadcastable to [..., N, K], or None for equal ones.
        work: two tensors like the weights; allocated if missing and wanted.
    """

    def __init__(
        self,
        weights: torch.Tensor,
        group_size: int,
        importance: torch.Tensor | None,
        work: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self._weights = weights
        self._groups = weights.unflatten(-1, (-1, group_size))
        self._share = None if importance is None else _shares(importance, group_size)
        self._mean = _mean(self._groups, self._share)
        if not weights.is_cuda:
            buffers = work or (torch.empty(weights.shape) for _ in range(2))
            self._codes, self._products = (buffer.unflatten(-1, (-1, group_size)) for buffer in buffers)

    def measure(self, grid: Grid) -> _CodeMoments:
        """Return the moments of the nearest codes, with each error weighed by its share."""
        mean, square, product = self._sums_on_gpu(grid) if self._weights.is_cuda else self._sums(grid)
        return _CodeMoments(mean, square - mean.square(), product - mean * self._mean)

    def _sums_on_gpu(self, grid: Grid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        from vllm_milo.kernels.convert import grid_fit

        share = None if self._share is None else self._share.flatten(-2)
        return grid_fit.code_sums(self._weights, *grid, share)

    def _sums(self, grid: Grid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the weighed sums over each group of codes, their squares, and their products with the weights."""
        groups, products = self._groups, self._products
        codes = _nearest_codes(groups, grid, self._codes)
        if self._share is None:
            mean = codes.mean(-1)
            square = torch.linalg.vector_norm(codes, dim=-1).square() / codes.shape[-1]
            product = torch.mul(codes, groups, out=products).mean(-1)
        else:
            mean = torch.mul(codes, self._share, out=products).sum(-1)
            square = codes.mul_(products).sum(-1)
            product = products.mul_(groups).sum(-1)
        return mean, square, product

    def score(self, grid: Grid, codes: _CodeMoments) -> torch.Tensor:
        """Return the mean squared error of each group minus the variance of its weights, the same for all grids."""
        scale = grid.scale.float()
        offset = scale * (codes.mean - grid.zero.float()) - self._mean
        return scale * (scale * codes.variance - 2 * codes.covariance) + offset.square()

    def regress(self, old: Grid, codes: _CodeMoments) -> Grid:
        """Return the grid that fits the weights best for these codes, as stored; ``old`` where all are alike."""
        scale = codes.covariance / codes.variance.clamp(min=1e-6)
        usable = (codes.variance > 1e-4) & (scale >= MIN_SCALE) & (scale <= MAX_SCALE)
        stored = torch.where(usable, scale, old.scale.float()).half()
        zero = (codes.mean - self._mean / stored.float()).clamp(-MAX_SCALE, MAX_SCALE).half()
        return Grid(stored, torch.where(usable, zero, old.zero))


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
