"""The kernels of the grid fit against torch."""

from __future__ import annotations

import pytest
import torch

from vllm_milo.kernels.convert import grid_fit
from vllm_milo.offline.solve.base.group import quantize_rtn
from vllm_milo.offline.solve.base.hqq import NORM, _step


@pytest.mark.parametrize("weighed", ["no", "each", "shared"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("batch", "rows", "columns"), [(1, 64, 256), (3, 5, 384), (2, 33, 128)])
def test_kernels_measure_what_torch_does(kernel_device, poisoned_empty, batch, rows, columns, group, weighed):
    """Of weights whose rows lie apart, as those of a slice."""
    wide = torch.randn(batch, rows, columns + 128) * 0.05
    weights = wide[..., 128:]
    grid = quantize_rtn(weights, group)
    share, importance = None, torch.tensor(1.0)
    if weighed != "no":
        importance = torch.rand(batch if weighed == "each" else 1, 1, columns)
        groups = importance.unflatten(-1, (-1, group))
        share = (groups / groups.sum(-1, keepdim=True)).flatten(-2)
    moved = wide.to(kernel_device)[..., 128:]
    scale, zero = grid.scale.to(kernel_device), grid.zero.to(kernel_device)
    codes = grid_fit.nearest_codes(moved, scale, zero).cpu()
    assert (codes != grid.codes).float().mean() < 1e-3  # a weight between two codes may go either way
    counted = (importance * torch.ones(weights.shape)).double().unflatten(-1, (-1, group))
    counted = counted / counted.sum(-1, keepdim=True)
    values, found_codes = (part.double().unflatten(-1, (-1, group)) for part in (weights, codes))
    found = grid_fit.code_sums(moved, scale, zero, None if share is None else share.to(kernel_device))
    for sums, expected in zip(found, (found_codes, found_codes**2, found_codes * values), strict=True):
        assert torch.allclose(sums.cpu().double(), (counted * expected).sum(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("batch", "rows", "columns"), [(1, 64, 256), (3, 5, 384), (2, 33, 128)])
def test_kernel_takes_the_half_quadratic_step_of_torch(kernel_device, poisoned_empty, batch, rows, columns, group):
    """Of weights whose rows lie apart; some lie on the grid, where the error has no sign and its power no value."""
    wide = torch.randn(batch, rows, columns + 128) * 0.05
    wide[..., 128 : 128 + columns // 2] = 0.0
    weights = wide[..., 128:]
    scale = (0.02 + 0.02 * torch.rand(batch, rows, columns // group)).half()
    zero = torch.randint(0, 8, scale.shape) + 0.3 * torch.randn(scale.shape) * (torch.rand(scale.shape) < 0.5)
    groups = weights.double().unflatten(-1, (-1, group))
    expected = _step(groups, scale)(zero.double(), 12.0)
    moved = wide.to(kernel_device)[..., 128:]
    found = grid_fit.half_quadratic_step(moved, scale.to(kernel_device), zero.to(kernel_device), 12.0, NORM)
    for values, right in zip(found, expected, strict=True):
        assert torch.allclose(values.cpu().double(), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("batch", "rows", "columns"), [(1, 64, 256), (3, 5, 384), (2, 33, 128)])
def test_kernel_adds_up_the_powers_of_errors(kernel_device, poisoned_empty, batch, rows, columns, group):
    """Of weights whose rows lie apart; half of them lie on the grid, where the error is 0."""
    wide = torch.randn(batch, rows, columns + 128) * 0.05
    wide[..., 128 : 128 + columns // 2] = 0.0
    weights = wide[..., 128:]
    scale = (0.02 + 0.02 * torch.rand(batch, rows, columns // group)).half()
    zero = torch.randint(0, 8, scale.shape).half()
    steps = weights.double().unflatten(-1, (-1, group)) / scale.double().unsqueeze(-1) + zero.unsqueeze(-1)
    expected = ((steps - steps.round().clamp(0, 7)) * scale.double().unsqueeze(-1)).abs().pow(NORM).sum(-1)
    moved = wide.to(kernel_device)[..., 128:]
    found = grid_fit.power_sums(moved, scale.to(kernel_device), zero.to(kernel_device), NORM)
    assert torch.allclose(found.cpu().double(), expected, rtol=1e-4, atol=1e-4)
