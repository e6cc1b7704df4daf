"""Ranks under a byte budget."""

from __future__ import annotations

import pytest
import torch

from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.nouns import Kind, Matrix, Moments, Recipe
from vllm_milo.offline.ranks.allocation import Curve, allocate, measure_curves
from vllm_milo.offline.ranks.budget import base_bits, rank_bits
from vllm_milo.offline.solve.methods import quantize_matrices

MATRICES = [Matrix(f"m{index}", Kind.ATTENTION, 256, 256) for index in range(4)]


def stored_bits(ranks, matrices, recipe):
    weights = sum(m.n * m.k for m in matrices)
    return base_bits(recipe.group_size) + sum(ranks[m.name] * rank_bits(m, 3) for m in matrices) / weights


def geometric(start, factor, steps=16):
    return Curve([start * factor**step for step in range(steps)])


@pytest.mark.parametrize("budget", [3.25, 3.3, 3.6, 3.75, 4.5])
def test_budget_is_kept_and_used(budget):
    recipe = Recipe(group_size=128)
    curves = {m.name: geometric(1 + index, 0.8) for index, m in enumerate(MATRICES)}
    bits = stored_bits(allocate(MATRICES, curves, budget, recipe), MATRICES, recipe)
    assert bits <= budget + 1e-9
    assert bits > budget - 8 * rank_bits(MATRICES[0], 3) / (256 * 256) / len(MATRICES)


def test_no_swap_of_one_step_would_lower_the_cost():
    recipe = Recipe()
    curves = {m.name: geometric(1 + 3 * index, 0.9 - 0.1 * index) for index, m in enumerate(MATRICES)}
    steps = {name: rank // 8 for name, rank in allocate(MATRICES, curves, 4.0, recipe).items()}
    assert len(set(steps.values())) > 1
    for giver in steps:
        for taker in steps:
            if giver != taker and steps[giver] > 0:
                lost = curves[giver].costs[steps[giver] - 1] - curves[giver].costs[steps[giver]]
                won = curves[taker].costs[steps[taker]] - curves[taker].costs[steps[taker] + 1]
                assert won <= lost + 1e-9


def test_a_late_drop_is_reached():
    """A curve that is flat at first, and falls later, is taken whole: the greedy step sees its hull."""
    curves = {m.name: geometric(0.01, 0.9) for m in MATRICES} | {"m2": Curve([1.0, 1.0, 1.0, 0.0])}
    ranks = allocate(MATRICES, curves, 3.5 + 3.01 * 8 * 512 * 3.25 / (4 * 256 * 256), Recipe())
    assert ranks["m2"] == 24


def test_a_budget_below_the_base_is_an_error():
    with pytest.raises(ConversionError, match=r"--budget-bits 3.4: .* group size 64 take 3.5 bits a weight"):
        allocate(MATRICES, {}, 3.4, Recipe())


@pytest.mark.parametrize("low_rank", [True, False])
def test_curves_foresee_what_the_loop_reaches(low_rank):
    torch.manual_seed(1)
    weights = torch.randn(1, 256, 256) * 0.05
    if low_rank:
        weights = 0.3 * weights + 0.02 * torch.randn(1, 256, 16) @ torch.randn(1, 16, 256)
    recipe = Recipe(factor_bits=8, max_rounds=12)
    (curve,) = measure_curves(weights, recipe, Moments())
    assert curve.costs == sorted(curve.costs, reverse=True)
    for rank in (0, 16, 48):
        reached = float(quantize_matrices(weights, rank, recipe, torch.bfloat16).errors) ** 2
        assert curve.costs[rank // 8] == pytest.approx(reached, rel=0.35)


def test_costs_are_relative_or_absolute():
    weights = torch.randn(2, 64, 128) * torch.tensor([1.0, 10.0])[:, None, None]
    relative = measure_curves(weights, Recipe(), Moments())
    absolute = measure_curves(weights, Recipe(), Moments(), relative=False)
    assert relative[1].costs[0] == pytest.approx(relative[0].costs[0], rel=0.1)
    assert absolute[1].costs[0] == pytest.approx(100 * absolute[0].costs[0], rel=0.1)


def test_large_matrices_get_a_partial_spectrum(monkeypatch):
    weights = torch.randn(1, 256, 320) * 0.05
    (exact,) = measure_curves(weights, Recipe(), Moments())
    monkeypatch.setattr("vllm_milo.offline.ranks.allocation.EXACT_SIZE", 128)
    (partial,) = measure_curves(weights, Recipe(), Moments())
    assert 4 < len(partial.costs) < len(exact.costs)
    for found, expected in zip(partial.costs, exact.costs, strict=False):
        assert found == pytest.approx(expected, rel=0.08)
