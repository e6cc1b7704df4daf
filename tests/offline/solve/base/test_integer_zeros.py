"""Integer zero points: in range, with the nearest codes, and close to what real ones leave."""

from __future__ import annotations

import pytest
import torch
from random_matrices import heavy_tailed

from vllm_milo.offline.nouns import Recipe
from vllm_milo.offline.solve.methods import quantize_matrices


def error(weights: torch.Tensor, method: str, **recipe) -> float:
    return float((quantize_matrices(weights, 0, Recipe(method=method, **recipe), torch.bfloat16).errors).mean())


@pytest.mark.parametrize("method", ["rtn", "hqq", "mse"])
def test_zero_points_are_integers_at_little_cost(method: str):
    weights = heavy_tailed(2, 64, 256)
    found = quantize_matrices(weights, 0, Recipe(method=method, integer_zeros=True), torch.bfloat16).base
    assert torch.equal(found.zero, found.zero.round())
    assert 0 <= float(found.zero.min()) <= float(found.zero.max()) <= 7
    grid = found.scale.float().unsqueeze(-1) * (torch.arange(8.0) - found.zero.float().unsqueeze(-1))
    values = grid.repeat_interleave(64, -2)
    nearest = (values - weights.unsqueeze(-1)).abs().min(-1).values
    assert torch.allclose((found.dequantize() - weights).abs(), nearest, atol=1e-6)
    assert error(weights, method, integer_zeros=True) < 1.2 * error(weights, method)


@pytest.mark.parametrize("method", ["rtn", "hqq", "mse"])
def test_groups_far_from_zero(method: str):
    """A grid of their own range has a zero point far below 0, so theirs begins at 0."""
    weights = 10 + torch.rand(1, 64, 128)
    found = quantize_matrices(weights, 0, Recipe(method=method, integer_zeros=True), torch.bfloat16).base
    assert float((found.dequantize() - weights).abs().max()) <= 11.01 / 7 / 2
    constant = torch.full((1, 64, 64), -0.3).half().float()
    found = quantize_matrices(constant, 0, Recipe(method=method, integer_zeros=True), torch.bfloat16).base
    assert torch.equal(found.dequantize(), constant)
