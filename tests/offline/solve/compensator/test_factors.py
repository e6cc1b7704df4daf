"""Truncated SVD, exact and randomized, and how factors are stored."""

from __future__ import annotations

import pytest
import torch

from vllm_milo.offline.solve.compensator.factors import store_factor, truncated_svd


@pytest.mark.parametrize("shape", [(2, 96, 64), (1, 64, 160)])
def test_truncated_svd_is_the_best_low_rank_approximation(shape):
    residual = torch.randn(shape, dtype=torch.float64).float()
    u, v = truncated_svd(residual, 16)
    values = torch.linalg.svdvals(residual)
    error = (residual - u.mT @ v).flatten(1).norm(dim=1)
    assert torch.allclose(error, values[:, 16:].norm(dim=1), rtol=1e-4)
    # the root of each singular value goes to both sides
    assert torch.allclose(u.norm(dim=-1), v.norm(dim=-1), rtol=1e-4)


def test_randomized_svd_is_close_and_seeded(monkeypatch):
    monkeypatch.setattr("vllm_milo.offline.solve.compensator.factors.EXACT_SIZE", 32)
    residual = torch.randn(2, 256, 320)
    found = [truncated_svd(residual, 24, torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(found[0][0], found[1][0])
    u, v = found[0]
    best = torch.linalg.svdvals(residual)[:, 24:].norm(dim=1)
    assert ((residual - u.mT @ v).flatten(1).norm(dim=1) < 1.02 * best).all()


@pytest.mark.parametrize(("bits", "limit"), [(3, 0.35), (8, 0.01), (16, 0.004)])
def test_stored_factors(bits, limit):
    factor = torch.randn(2, 8, 128) * torch.logspace(-3, 3, 8)[:, None]
    factor[0, 0, :64] = -factor[0, 0, :64].abs()  # a group without positive values
    factor[1, 1] = 0
    stored = store_factor(factor, bits, torch.bfloat16)
    error = (stored.dequantize() - factor).norm(dim=-1) / factor.norm(dim=-1).clamp(min=1e-9)
    assert error.max() < limit
    assert stored.values.dtype == {3: torch.uint8, 8: torch.int8, 16: torch.bfloat16}[bits]
