"""The calibrated base quantizer: codes chosen column by column, each column's error fed into the columns to come.

The update is that of Optimal Brain Compression and GPTQ; the grid of each group is fitted by least squares (scale and
real zero point) to the weights as they stand when the group's turn comes.
"""

from __future__ import annotations

import torch

from .least_squares import Grid, fit_grid
from .quantizer import MAX_CODE, GroupQuantized


def feedback_factor(root: torch.Tensor) -> torch.Tensor:
    """Return the upper Cholesky factor T of R⁻¹ = Tᵀ·T, R = root·rootᵀ; root lower triangular [B, K, K]."""
    return torch.linalg.cholesky(torch.cholesky_inverse(root), upper=True)


def quantize_with_feedback(
    weights: torch.Tensor, group_size: int, factor: torch.Tensor, start: GroupQuantized | None = None, fits: int = 4
) -> GroupQuantized:
    """Quantize weights so that the error is small in the metric of their inputs.

    Args:
        weights: float32 [B, N, K].
        group_size: consecutive weights of a row that share one scale and zero point; divides K.
        factor: of :func:`feedback_factor`, [B, K, K].
        start: an earlier result, whose grids the fits go on from.
        fits: regressions of each group's grid.
    """
    left = weights.clone()
    codes = torch.empty(weights.shape, dtype=torch.uint8, device=weights.device)
    grids: list[Grid] = []
    importance = factor.diagonal(dim1=-2, dim2=-1).square().reciprocal().unsqueeze(-2)
    for index, begin in enumerate(range(0, weights.shape[-1], group_size)):
        columns = slice(begin, begin + group_size)
        old = None if start is None else Grid(start.scale[..., index, None], start.zero[..., index, None])
        grid = fit_grid(left[..., columns], group_size, importance[..., columns], old, fits)
        grids.append(grid)
        errors = _quantize_group(left[..., columns], factor[..., columns, columns], grid, codes[..., columns])
        left[..., columns.stop :] -= errors @ factor[..., columns, columns.stop :]
    return GroupQuantized(codes, *(torch.cat(parts, -1) for parts in zip(*grids, strict=True)))


def _quantize_group(group: torch.Tensor, factor: torch.Tensor, grid: Grid, codes: torch.Tensor) -> torch.Tensor:
    """Choose the codes [B, N, g] of one group, in place; return the scaled errors [B, N, g] for later columns."""
    work = group.mT.contiguous()  # columns become rows, which are contiguous
    scale, zero = grid.scale.float().squeeze(-1), grid.zero.float().squeeze(-1)
    inverse = scale.reciprocal()
    errors = torch.empty_like(work)
    for j in range(work.shape[-2]):
        column = work[:, j]
        code = torch.addcmul(zero, column, inverse).round_().clamp_(0, MAX_CODE)
        codes[..., j] = code.to(torch.uint8)
        value = (code - zero) * scale
        errors[:, j] = (column - value) / factor[:, j, j, None]
        work[:, j + 1 :] -= factor[:, j, j + 1 :, None] * errors[:, j, None]
    return errors.mT
