"""What bounds an expert's outputs."""

from __future__ import annotations

import pytest
import torch
from random_layers import moe_spec, random_experts

from vllm_milo.kernels import bounds, reference
from vllm_milo.kernels.bounds import largest_row_norms

RANKS = [[16, 8], [0, 24], [0, 0]]


@pytest.mark.parametrize("bits", [3, 8, 16])
@pytest.mark.parametrize("rows", [64, 2048])
def test_norms_are_those_of_weights_and_compensators(bits: int, rows: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bounds, "ROWS", rows)
    weights = random_experts(RANKS, 2 * 192, 128, 64, bits)
    spec = moe_spec(RANKS, [[0]] * 3, bits)
    found = largest_row_norms(weights, bits)
    assert found.shape == (6,)
    for expert in range(3):
        matrix = reference.expert_gemm(torch.eye(128, dtype=torch.float64), weights, expert, spec).T  # [N, K]
        expected = [part.norm(dim=1).max() for part in matrix.split(192)]
        assert torch.allclose(found[2 * expert :][:2].double(), torch.stack(expected), rtol=1e-4)


def test_norms_are_in_float32_while_a_model_is_made():
    """vLLM makes the model's dtype the default."""
    weights = random_experts(RANKS, 2 * 64, 128, 64, 3)
    expected = largest_row_norms(weights, 3)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = largest_row_norms(weights, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_outputs_stay_below_the_bound():
    weights = random_experts(RANKS, 2 * 64, 128, 64, 3)
    spec = moe_spec(RANKS, [[0]] * 3, 3)
    found = largest_row_norms(weights, 3)
    x = torch.randn(20, 128, dtype=torch.float64)
    for expert in range(3):
        gate, up = reference.expert_gemm(x, weights, expert, spec).chunk(2, dim=1)
        limit = found[2 * expert] * found[2 * expert + 1] * x.norm(dim=1) ** 2
        assert (reference.ACTIVATIONS["silu"](gate) * up).abs().amax(dim=1).le(limit).all()
