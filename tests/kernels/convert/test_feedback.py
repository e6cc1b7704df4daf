"""Error feedback: the kernel against torch, and both against what the feedback is for."""

from __future__ import annotations

import pytest
import torch

from vllm_milo.kernels.convert import feedback
from vllm_milo.offline.nouns import Moments
from vllm_milo.offline.solve.base.error_feedback import quantize_group, quantize_with_feedback
from vllm_milo.offline.solve.base.least_squares import Grid, quantize_mse
from vllm_milo.offline.solve.metric import metric_of


def moment(batch: int, size: int) -> torch.Tensor:
    samples = torch.randn(batch, 4 * size, 16) @ torch.randn(batch, 16, size) + 0.5 * torch.randn(batch, 4 * size, size)
    return samples.mT @ samples / samples.shape[1]


def factor_of(moments: torch.Tensor) -> torch.Tensor:
    factor = metric_of(Moments(moments)).feedback_factor
    assert factor is not None
    return factor


def grids(batch: int, rows: int) -> Grid:
    return Grid((0.01 + 0.02 * torch.rand(batch, rows, 1)).half(), (3.5 + torch.randn(batch, rows, 1)).half())


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("batch", "shared", "rows"), [(1, 1, 64), (3, 3, 33), (3, 1, 100), (2, 2, 1)])
def test_kernel_does_what_torch_does(kernel_device, poisoned_empty, batch, shared, rows, group):
    """A slice of columns of wider weights, rows that fill no tile, moments of each matrix or of all."""
    weights = torch.randn(batch, rows, 3 * group) * 0.05
    columns = slice(group, 2 * group)
    block = factor_of(moment(shared, 3 * group))[..., columns, columns]
    grid = grids(batch, rows)
    codes = torch.full(weights.shape, 77, dtype=torch.uint8)
    expected = quantize_group(weights[..., columns].clone(), block, grid, codes[..., columns])
    found_codes = torch.full_like(codes, 77).to(kernel_device)
    arguments = (weights.to(kernel_device)[..., columns], block.to(kernel_device))
    scale, zero = (part[..., 0].float().to(kernel_device) for part in grid)
    found = feedback.quantize_group(*arguments, scale, zero, found_codes[..., columns]).cpu()
    # a code that lies between two may be rounded either way; what follows in its row is then another
    same = (found_codes.cpu() == codes).all(-1)
    assert same.float().mean() > 0.95
    assert (found_codes.cpu()[..., : columns.start] == 77).all()
    assert (found_codes.cpu()[..., columns.stop :] == 77).all()
    assert found_codes[..., columns].max() <= 7
    assert torch.allclose(found[same], expected[same], atol=1e-4 * float(expected.abs().max()))


def test_float64_reference():
    """The textbook loop over columns, one weight at a time."""
    group, rows = 32, 5
    weights, factor, grid = torch.randn(1, rows, group) * 0.05, factor_of(moment(1, group)), grids(1, rows)
    codes = torch.empty(1, rows, group, dtype=torch.uint8)
    quantize_group(weights.clone(), factor, grid, codes)
    left, upper = weights[0].double().clone(), factor[0].double()
    for row in range(rows):
        scale, zero = float(grid.scale[0, row]), float(grid.zero[0, row])
        for j in range(group):
            code = min(max(round(zero + float(left[row, j]) / scale), 0), 7)
            assert code == int(codes[0, row, j]), (row, j)
            error = (float(left[row, j]) - scale * (code - zero)) / float(upper[j, j])
            left[row, j:] -= error * upper[j, j:]


@pytest.mark.parametrize("shared", [1, 3])
def test_feedback_costs_less_in_its_metric(kernel_device, shared):
    weights = torch.randn(3, 64, 256, device=kernel_device) * 0.05
    moments = moment(shared, 256).to(kernel_device)
    metric = metric_of(Moments(moments))
    fed = quantize_with_feedback(weights, 64, metric.feedback_factor)
    plain = quantize_mse(weights, 64, metric.importance(of_inputs=True))
    assert (metric.cost(weights - fed.dequantize()) < 0.6 * metric.cost(weights - plain.dequantize())).all()
