"""The calibrated base quantizer: codes chosen column by column, each column's error fed into the columns to come.

The update is that of Optimal Brain Compression and GPTQ. The grid of each group is fitted by least squares (scale and
real zero point) to the weights as they stand when the group's turn comes.
"""

from __future__ import annotations

import torch

from vllm_milo.kernels.packing import MAX_CODE

from ..precision import fast_products
from .group import GroupQuantized
from .least_squares import Grid, fit_grid


def quantize_with_feedback(
    weights: torch.Tensor, group_size: int, factor: torch.Tensor, start: GroupQuantized | None = None, fits: int = 4
) -> GroupQuantized:
    """Quantize weights so that the error is small in the metric of their inputs.

    Args:
        weights: float32 [B, N, K].
        group_size: consecutive weights of a row that share one scale and zero point; divides K.
        factor: of :attr:`.metric.Metric.feedback_factor`, [B, K, K] or [1, K, K] for all.
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
        errors = quantize_group(left[..., columns], factor[..., columns, columns], grid, codes[..., columns])
        with fast_products(weights.device):
            left[..., columns.stop :] -= errors @ factor[..., columns, columns.stop :]
    return GroupQuantized(codes, *(torch.cat(parts, -1) for parts in zip(*grids, strict=True)))


def quantize_group(group: torch.Tensor, factor: torch.Tensor, grid: Grid, codes: torch.Tensor) -> torch.Tensor:
    """Choose the codes [B, N, g] of one group, in place; return the scaled errors [B, N, g] for later columns.

    All weights of a row share the grid here, so the columns are kept in steps of the grid, where a code is one
    rounding. On GPUs one kernel does it.
    """
    if group.is_cuda:
        from vllm_milo.kernels.convert.feedback import quantize_group as quantize_group_on_gpu

        return quantize_group_on_gpu(group, factor, grid.scale[..., 0].float(), grid.zero[..., 0].float(), codes)
    scale, zero = grid.scale.float().mT, grid.zero.float().mT
    left = torch.addcmul(zero, group.mT, scale.reciprocal())  # [B, g, N]: columns become rows, which are contiguous
    diagonal = factor.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    spread = (factor / diagonal).unsqueeze(-1)
    chosen, errors = torch.empty_like(left), torch.empty_like(left)
    for j in range(left.shape[-2]):
        torch.round(left[:, j], out=chosen[:, j]).clamp_(0, MAX_CODE)
        torch.sub(left[:, j], chosen[:, j], out=errors[:, j])
        left[:, j + 1 :].addcmul_(spread[:, j, j + 1 :], errors[:, j, None], value=-1)
    codes.copy_(chosen.mT)
    return errors.mul_(scale).div_(diagonal).mT
