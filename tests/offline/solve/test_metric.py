"""The metric: what an error costs by moments, and rows in its coordinates and back."""

from __future__ import annotations

import pytest
import torch
from random_matrices import all_moments

from vllm_milo.offline.nouns import Moments
from vllm_milo.offline.solve.metric import metric_of


@pytest.mark.parametrize("kind", ["none", "diagonal", "full"])
def test_cost_is_the_trace_form(kind):
    moments = all_moments(2, 64, 128)[kind]
    error = torch.randn(2, 64, 128)
    inputs = torch.eye(128).expand(2, -1, -1) if moments.inputs is None else moments.inputs
    outputs = torch.eye(64).expand(2, -1, -1) if moments.outputs is None else moments.outputs
    inputs, outputs = (torch.diag_embed(part) if part.dim() == 2 else part for part in (inputs, outputs))
    expected = (outputs @ error @ inputs @ error.mT).diagonal(dim1=-2, dim2=-1).sum(-1)
    # the damping of the moments adds a little
    assert torch.allclose(metric_of(moments).cost(error), expected, rtol=0.05 if kind != "none" else 1e-5)


@pytest.mark.parametrize("kind", ["none", "diagonal", "full"])
def test_rows_are_whitened_and_back(kind):
    metric = metric_of(all_moments(2, 64, 128)[kind])
    u, v = torch.randn(2, 8, 64), torch.randn(2, 8, 128)
    whitened = metric.whiten(u.mT @ v)
    left, right = metric.whiten_rows(u, of_inputs=False), metric.whiten_rows(v, of_inputs=True)
    assert torch.allclose(left.mT @ right, whitened, rtol=1e-3, atol=1e-3)
    assert torch.allclose(metric.color_rows(left, of_inputs=False), u, atol=1e-3)
    assert torch.allclose(metric.color_rows(right, of_inputs=True), v, atol=1e-3)


def test_singular_moments_are_damped():
    samples = torch.randn(1, 3, 128)
    metric = metric_of(Moments(samples.mT @ samples))
    assert torch.isfinite(metric.color_rows(torch.randn(1, 4, 128), of_inputs=True)).all()
