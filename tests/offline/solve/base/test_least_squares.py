"""Grids fitted by least squares: better than half-quadratic ones, weighed by importance, refitted."""

from __future__ import annotations

import pytest
import torch
from random_matrices import heavy_tailed

from vllm_milo.offline.solve.base.group import GroupQuantized, quantize_rtn
from vllm_milo.offline.solve.base.hqq import quantize_hqq
from vllm_milo.offline.solve.base.least_squares import quantize_mse, refit


def test_mse_beats_hqq_and_its_own_start():
    weights = heavy_tailed(4, 128, 256)

    def error(result):
        return float((result.dequantize() - weights).square().mean())

    assert error(quantize_mse(weights, 64)) < 0.9 * error(quantize_hqq(weights, 64))
    first = quantize_mse(weights, 64, fits=1)
    assert error(quantize_mse(weights, 64, start=first)) < error(first)


def test_mse_never_does_worse_than_rtn_in_any_group():
    weights = heavy_tailed(2, 64, 256) ** 3
    groups = [
        (quantize(weights, 64).dequantize() - weights).square().unflatten(-1, (-1, 64)).sum(-1)
        for quantize in (quantize_mse, quantize_rtn)
    ]
    assert (groups[0] <= groups[1] * (1 + 1e-5)).all()


def test_importance_moves_the_error_to_unimportant_inputs():
    weights = heavy_tailed(1, 64, 128)
    importance = torch.ones(1, 1, 128)
    importance[..., ::4] = 100
    plain, weighted = (
        (quantize_mse(weights, 64, given).dequantize() - weights).square() for given in (None, importance)
    )
    assert weighted[..., ::4].mean() < 0.7 * plain[..., ::4].mean()
    assert (weighted * importance).sum() < (plain * importance).sum()


@pytest.mark.parametrize("importance", [None, torch.linspace(0.1, 2, 320).reshape(1, 1, 320)])
def test_refit_finds_the_grid_that_made_the_weights(importance):
    codes = torch.randint(0, 8, (3, 5, 5, 64)).float()
    scale, zero = torch.rand(3, 5, 5).half() + 0.1, (torch.rand(3, 5, 5) * 7).half()
    weights = (scale.float().unsqueeze(-1) * (codes - zero.float().unsqueeze(-1))).flatten(-2)
    near = GroupQuantized(codes.flatten(-2).byte(), (scale.float() * 1.02).half(), zero)
    found = refit(weights, near, 64, importance, 3, (torch.empty_like(weights), torch.empty_like(weights)))
    assert torch.allclose(found.scale.float(), scale.float(), rtol=2e-3)
    assert torch.allclose(found.zero.float(), zero.float(), atol=2e-2)
    assert torch.equal(found.codes, codes.flatten(-2).byte())


def test_refit_lowers_the_error():
    weights = heavy_tailed(2, 64, 128)
    old = quantize_rtn(weights, 64)
    found = refit(weights, old, 64, None, 2, (torch.empty_like(weights), torch.empty_like(weights)))
    before, after = ((q.dequantize() - weights).square().unflatten(-1, (-1, 64)).sum(-1) for q in (old, found))
    assert (after <= before * 1.001).all()
    assert after.sum() < 0.95 * before.sum()
