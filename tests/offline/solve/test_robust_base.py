"""The joint loop on HQQ's base, for weights of whose inputs nothing is known."""

from __future__ import annotations

import pytest
import torch
from random_matrices import heavy_tailed, moment, trained_like

from vllm_milo.offline.nouns import Moments, Recipe
from vllm_milo.offline.solve import joint_loop
from vllm_milo.offline.solve.base.hqq import NORM, quantize_hqq
from vllm_milo.offline.solve.methods import Quantized, quantize_matrices

WEIGHTS = {"heavy tails": heavy_tailed, "strong directions": trained_like}


def robust(rank: int | list[int], weights: torch.Tensor, bits: int = 3, group: int = 64, **others) -> Quantized:
    recipe = Recipe(group_size=group, factor_bits=bits, max_rounds=6, base="hqq")
    return quantize_matrices(weights, rank, recipe, torch.bfloat16, **others)


def norm(error: torch.Tensor) -> torch.Tensor:
    """The norm that HQQ lowers, of each matrix."""
    return error.abs().double().pow(NORM).flatten(1).sum(1)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("bits", [3, 8, 16])
def test_a_compensator_lowers_the_norm_of_hqq(kind: str, bits: int):
    weights = WEIGHTS[kind](3, 128, 256)
    alone = norm(weights - quantize_hqq(weights, 64).dequantize())
    few, many = (norm(weights - robust(rank, weights, bits).dequantize()) for rank in (8, 32))
    assert (few < alone).all()
    assert (many < few).all()


def test_at_equal_bits_ranks_beat_smaller_groups():
    """Groups of 128 and a rank of 24 store 3.86 bits a weight, groups of 32 store 4; weights have strong directions."""
    weights = trained_like(2, 256, 256)
    fine = norm(weights - quantize_hqq(weights, 32).dequantize())
    assert (norm(weights - robust(24, weights, group=128).dequantize()) < fine).all()


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_loop_beats_a_compensator_fitted_once(kind: str):
    """At equal rank and bits: HQQ of the weights, then the best compensator of what it leaves."""
    weights = WEIGHTS[kind](2, 128, 256)
    base = quantize_hqq(weights, 64).dequantize()
    u, size, v = torch.linalg.svd(weights - base, full_matrices=False)
    once = norm(weights - base - u[..., :16] * size[:, None, :16] @ v[:, :16])
    assert (norm(weights - robust(16, weights, 16).dequantize()) < once).all()


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_without_ranks_it_is_hqq(kind: str, group: int):
    weights = WEIGHTS[kind](3, 64, 256)
    found, expected = robust(0, weights, group=group), quantize_hqq(weights, group)
    for ours, theirs in zip(found.base, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert found.u is None
    plain = quantize_matrices(weights, 0, Recipe("hqq", group), torch.bfloat16)
    assert torch.equal(found.errors, plain.errors)


@pytest.mark.parametrize("bits", [3, 16])
def test_same_seed_same_result(bits: int):
    weights = trained_like(2, 64, 128)
    first, second = (robust([8, 16], weights, bits) for _ in range(2))
    for ours, theirs in zip(first.base, second.base, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in ((first.u, second.u), (first.v, second.v)):
        assert torch.equal(ours.dequantize(), theirs.dequantize())
    assert torch.equal(first.errors, second.errors)


def test_ranks_of_a_batch_do_not_meet():
    ranks, weights = [8, 24, 40], trained_like(3, 64, 128)
    together = robust(ranks, weights)
    for index, rank in enumerate(ranks):
        alone = robust(rank, weights[index : index + 1])
        assert torch.allclose(together.errors[index], alone.errors, rtol=0.02)
        assert (together.u.dequantize()[index, rank:] == 0).all()


def test_nothing_is_fed_back_to_it(monkeypatch: pytest.MonkeyPatch):
    """Not even where the inputs are known: the base stays HQQ's."""
    monkeypatch.setattr(joint_loop, "quantize_with_feedback", None)
    monkeypatch.setattr(joint_loop, "quantize_mse", None)
    monkeypatch.setattr(joint_loop, "refit", None)
    found = robust(8, trained_like(2, 64, 128), moments=Moments(moment(1, 128)))
    assert torch.isfinite(found.errors).all()


def test_a_matrix_of_low_rank_goes_to_the_compensator():
    """What is left to the base may be too small for fp16 scales, in all of the matrix."""
    weights = torch.randn(1, 64, 8) @ torch.randn(1, 8, 128) * 0.01
    assert float(robust(8, weights, bits=8).errors) < 0.01
    assert float(robust(8, weights, bits=16).errors) < 0.01


def test_zero_and_constant_matrices():
    weights = torch.zeros(2, 64, 128)
    weights[1] = 0.25
    found = robust(8, weights)
    assert torch.isfinite(found.dequantize()).all()
    assert found.errors.max() < 1e-3
