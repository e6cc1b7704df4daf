"""Low-rank factors in a metric."""

from __future__ import annotations

import pytest
import torch
from random_matrices import all_moments, trained_like

from vllm_milo.offline.solve.compensator.factors import store_factor
from vllm_milo.offline.solve.compensator.low_rank import leading_rows, store_pair
from vllm_milo.offline.solve.compensator.orthonormal import orthonormal_rows
from vllm_milo.offline.solve.metric import metric_of


def test_leading_rows_are_orthonormal_and_near_the_best():
    matrix = torch.randn(2, 256, 192)
    left, right = leading_rows(matrix, 24, torch.Generator().manual_seed(0))
    assert torch.allclose(left @ left.mT, torch.eye(24).expand(2, -1, -1), atol=1e-4)
    best = torch.linalg.svdvals(matrix)[:, 24:].norm(dim=1)
    assert ((matrix - left.mT @ right).flatten(1).norm(dim=1) < 1.02 * best).all()
    again, _ = leading_rows(matrix, 24, torch.Generator().manual_seed(0), start=right)
    assert again.shape == left.shape


def test_dependent_rows_stay_finite():
    rows = torch.randn(1, 4, 64).repeat(1, 2, 1)
    rows[:, 0] = 0
    assert torch.isfinite(orthonormal_rows(rows)).all()


@pytest.mark.parametrize("kind", ["none", "diagonal", "full"])
def test_refitted_factors_cost_less_than_stored_ones(kind):
    metric = metric_of(all_moments(2, 128, 192)[kind])
    residual = trained_like(2, 128, 192)
    whitened = metric.whiten(residual)
    left, right = leading_rows(whitened, 16, torch.Generator().manual_seed(0))
    root = right.norm(dim=-1, keepdim=True).sqrt()
    u, v = metric.color_rows(left * root, of_inputs=False), metric.color_rows(right / root, of_inputs=True)
    plain = store_factor(u, 3, torch.float32).dequantize().mT @ store_factor(v, 3, torch.float32).dequantize()
    fitted = store_pair(whitened, right, metric, 3, torch.float32).product()
    assert (metric.cost(residual - fitted) < 0.95 * metric.cost(residual - plain)).all()
