"""The joint loop: low-rank factors stored inside the loop, and the best state seen."""

from __future__ import annotations

import pytest
import torch
from random_matrices import all_moments, trained_like

from vllm_milo.offline.nouns import Moments, Recipe
from vllm_milo.offline.solve import joint_loop
from vllm_milo.offline.solve.base.least_squares import quantize_mse
from vllm_milo.offline.solve.joint_loop import quantize_jointly
from vllm_milo.offline.solve.methods import quantize_matrices
from vllm_milo.offline.solve.metric import metric_of


@pytest.mark.parametrize("bits", [3, 8, 16])
@pytest.mark.parametrize("kind", ["none", "diagonal", "full"])
def test_more_rounds_and_more_ranks_never_cost_more(kind, bits):
    weights, moments = trained_like(2, 64, 128), all_moments(2, 64, 128)[kind]

    def cost(rank, rounds):
        recipe = Recipe(factor_bits=bits, max_rounds=rounds)
        state = quantize_jointly(weights, [rank] * 2, moments, recipe, torch.bfloat16)
        compensator = state.pair.product() if state.pair else 0
        return metric_of(moments).cost(weights - state.base.dequantize() - compensator)

    plain = metric_of(moments).cost(weights - quantize_mse(weights, 64).dequantize())
    few, many, wide = cost(8, 1), cost(8, 6), cost(24, 6)
    assert (few < plain).all()
    assert (many <= few).all()
    assert (wide < many).all()


@pytest.mark.parametrize("bits", [3, 8, 16])
def test_beats_the_published_loop(bits):
    weights = torch.randn(2, 128, 256) * torch.rand(128, 256) * 0.1
    paper, joint = (
        quantize_matrices(weights, 32, Recipe(method, factor_bits=bits), torch.bfloat16).errors
        for method in ("paper", "milo")
    )
    assert (joint < 0.9 * paper).all()


def test_each_matrix_of_a_batch_takes_its_own_beginning():
    """Alone or beside others that begin otherwise, decided or not, a matrix gets the same result."""
    weights = torch.stack([torch.randn(64, 128), *trained_like(4, 64, 128) * torch.logspace(0, 1, 4)[:, None, None]])
    weights[3:] += torch.randn(2, 64, 128) * 0.05
    recipe = Recipe(max_rounds=6)
    together = quantize_jointly(weights, [8] * len(weights), Moments(), recipe, torch.bfloat16).cost
    alone = [quantize_jointly(w[None], [8], Moments(), recipe, torch.bfloat16).cost for w in weights]
    assert torch.allclose(together, torch.cat(alone), rtol=0.02)


@pytest.mark.parametrize("bits", [3, 8, 16])
@pytest.mark.parametrize("kind", ["none", "full"])
def test_ranks_of_a_batch_do_not_meet(kind, bits):
    """A matrix gets beside others of other ranks what it gets alone, and nothing beyond its own rank."""
    ranks = [8, 24, 24, 40, 16]
    weights, moments = trained_like(5, 64, 128), all_moments(5, 64, 128)[kind]
    recipe = Recipe(factor_bits=bits, max_rounds=4)
    together = quantize_matrices(weights, ranks, recipe, torch.bfloat16, moments)
    assert together.u.values.shape == (5, 40, 64)
    assert together.v.values.shape == (5, 40, 128)
    for index, rank in enumerate(ranks):
        one = slice(index, index + 1)
        own = moments.select(one)
        alone = quantize_matrices(weights[one], rank, recipe, torch.bfloat16, own)
        assert torch.allclose(together.errors[one], alone.errors, rtol=0.02)
        for factor in (together.u, together.v):
            assert (factor.dequantize()[index, rank:] == 0).all()
            assert (factor.dequantize()[index, :rank] != 0).any(-1).all()


def test_no_batch_with_and_without_compensators():
    with pytest.raises(ValueError, match="cannot be in one batch"):
        quantize_matrices(torch.randn(2, 64, 128), [0, 8], Recipe(), torch.bfloat16)
    with pytest.raises(ValueError, match="batches of one rank"):
        quantize_matrices(torch.randn(2, 64, 128), [8, 16], Recipe("paper"), torch.bfloat16)


def test_both_beginnings_go_on_where_they_are_close(monkeypatch):
    """With every matrix undecided the result is the better of two full descents, matrix by matrix."""
    weights, recipe = torch.randn(3, 128, 256), Recipe(max_rounds=10)

    def cost(low_rank_wins, plain_wins):
        monkeypatch.setattr(joint_loop, "LOW_RANK_WINS", low_rank_wins)
        monkeypatch.setattr(joint_loop, "PLAIN_WINS", plain_wins)
        return quantize_jointly(weights, [24] * 3, Moments(), recipe, torch.bfloat16).cost

    both, plain, low_rank = cost(0, 1e9), cost(0, 0), cost(1e9, 1e9)
    assert not torch.allclose(plain, low_rank, rtol=1e-3)
    assert torch.allclose(both, torch.minimum(plain, low_rank), rtol=1e-3)


def test_a_matrix_of_low_rank_goes_to_the_compensator():
    left, right = torch.randn(1, 64, 8), torch.randn(1, 8, 128)
    result = quantize_matrices(left @ right * 0.01, 8, Recipe(factor_bits=8), torch.bfloat16)
    assert float(result.errors) < 0.01


def test_zero_and_constant_matrices():
    weights = torch.zeros(2, 64, 128)
    weights[1] = 0.25
    result = quantize_matrices(weights, 8, Recipe(max_rounds=3), torch.bfloat16)
    assert torch.isfinite(result.dequantize()).all()
    assert result.errors.max() < 1e-3


def test_same_seed_same_result():
    weights = trained_like(2, 64, 128)
    first, second = (quantize_matrices(weights, 16, Recipe(max_rounds=3), torch.bfloat16) for _ in range(2))
    assert torch.equal(first.base.codes, second.base.codes)
    assert torch.equal(first.u.values, second.u.values)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [0, 24])
@pytest.mark.parametrize("kind", ["none", "diagonal", "full"])
def test_a_gpu_gets_as_far_as_a_cpu(kind, rank):
    """Its products are less precise, kernels do its sums, and its random sketches are others, which alone count 3 %."""
    weights, moments = trained_like(8, 128, 256), all_moments(8, 128, 256)[kind]
    metric = metric_of(moments)

    def cost(device):
        moved = Moments(*(None if m is None else m.to(device) for m in (moments.inputs, moments.outputs)))
        found = quantize_matrices(weights.to(device), rank, Recipe(max_rounds=8), torch.bfloat16, moved)
        return metric.cost(weights - found.dequantize().cpu()).sqrt().mean()

    assert torch.allclose(cost("cuda"), cost("cpu"), rtol=0.06)
