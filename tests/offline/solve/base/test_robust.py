"""HQQ with a choice of scales."""

from __future__ import annotations

import pytest
import torch
from random_matrices import heavy_tailed, trained_like

from vllm_milo.offline.solve.base.hqq import NORM, quantize_hqq
from vllm_milo.offline.solve.base.robust import SHARES, quantize_robustly

WEIGHTS = {"heavy tails": heavy_tailed, "strong directions": trained_like}


def norms(weights: torch.Tensor, found: torch.Tensor, group: int) -> torch.Tensor:
    """What HQQ lowers, of each group."""
    return (weights - found).double().abs().pow(NORM).unflatten(-1, (-1, group)).sum(-1)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_no_group_is_worse_than_hqq_and_some_take_less_of_their_range(kind: str, group: int):
    weights = WEIGHTS[kind](3, 64, 256)
    plain, found = quantize_hqq(weights, group), quantize_robustly(weights, group)
    before, after = (norms(weights, one.dequantize(), group) for one in (plain, found))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < before.sum()
    taken = found.scale.float() / plain.scale.float()
    cut = taken < 1
    assert 0.05 < cut.float().mean() < 0.95
    assert torch.allclose(taken[cut], torch.tensor(min(SHARES)), rtol=2e-3)


def test_a_matrix_does_not_depend_on_the_others_of_its_batch():
    weights = trained_like(3, 64, 128)
    together = quantize_robustly(weights, 64)
    alone = quantize_robustly(weights[1:2], 64)
    for ours, theirs in zip(together, alone, strict=True):
        assert torch.equal(ours[1:2], theirs)


def test_constant_zero_and_tiny_groups_stay_as_exact_as_with_hqq():
    weights = torch.randn(1, 64, 128) * 0.02
    weights[:, :8] = 0.0
    weights[:, 8:16] = 0.25
    weights[:, 16:24] *= 1e-6
    plain, found = (quantize(weights, 64).dequantize() for quantize in (quantize_hqq, quantize_robustly))
    assert torch.isfinite(found).all()
    assert ((weights - found)[:, :16].abs() <= (weights - plain)[:, :16].abs()).all()
    assert (weights - found)[:, 16:24].abs().max() <= (weights - plain)[:, 16:24].abs().max() * 1.01
