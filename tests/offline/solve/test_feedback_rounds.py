"""Moments that many matrices share, and error feedback in the last rounds of the joint loop."""

from __future__ import annotations

import pytest
import torch

from vllm_milo.offline.nouns import Moments, Recipe
from vllm_milo.offline.solve import joint_loop
from vllm_milo.offline.solve.methods import quantize_matrices
from vllm_milo.offline.solve.metric import metric_of


@pytest.mark.parametrize("rank", [0, 8, [8, 16, 24]])
def test_a_shared_moment_is_one_for_each(rank: int | list[int]):
    weights = torch.randn(3, 64, 128) * 0.05
    samples = torch.randn(512, 128) * torch.logspace(-1, 1, 128)
    shared = (samples.mT @ samples / 512).unsqueeze(0)
    for feedback in (None, 1):
        recipe = Recipe(max_rounds=4, feedback_rounds=feedback)
        once, stacked = (
            quantize_matrices(weights, rank, recipe, torch.bfloat16, Moments(moment))
            for moment in (shared, shared.expand(3, -1, -1).contiguous())
        )
        assert torch.allclose(once.errors, stacked.errors, rtol=0.02)
    one = slice(2, 3)
    assert Moments(shared).select(one).inputs is shared
    assert torch.equal(Moments(shared, weights).select(one).outputs, weights[one])


def test_feedback_in_the_last_rounds_only(monkeypatch: pytest.MonkeyPatch):
    calls = []
    feed = joint_loop.quantize_with_feedback
    monkeypatch.setattr(
        joint_loop, "quantize_with_feedback", lambda w, *others: (calls.append(len(w)), feed(w, *others))[1]
    )
    monkeypatch.setattr(joint_loop, "PLAIN_WINS", 0)  # one path goes on
    weights, moments = torch.randn(2, 64, 128) * 0.05, Moments(torch.eye(128).unsqueeze(0))

    def count(rank: int, rounds: int, feedback: int | None) -> int:
        calls.clear()
        recipe = Recipe(max_rounds=rounds, feedback_rounds=feedback)
        quantize_matrices(weights, rank, recipe, torch.bfloat16, moments)
        return len(calls)

    assert count(8, 6, 2) == 2
    assert count(8, 6, 0) == 0
    assert count(8, 2, 2) == 2 * 3  # two paths, each with a beginning
    assert count(8, 6, None) == 2 * 4 + 4  # beginnings, two rounds and trials of both paths, then four of one
    assert count(0, 6, None) == 1  # the only base there is
    assert count(0, 6, 0) == 0


def test_feedback_at_the_end_gains_most_of_what_it_gains_in_all_rounds():
    samples = torch.randn(2000, 16) @ torch.randn(16, 128) + 0.3 * torch.randn(2000, 128)
    moments = Moments((samples.mT @ samples / 2000).unsqueeze(0))
    weights = torch.randn(4, 64, 128) * 0.05

    def cost(feedback: int | None) -> float:
        recipe = Recipe(max_rounds=10, feedback_rounds=feedback)
        found = quantize_matrices(weights, 8, recipe, torch.bfloat16, moments)
        return float(metric_of(moments).cost(weights - found.dequantize()).sum())

    never, late, always = cost(0), cost(2), cost(None)
    assert always <= late < never
    assert never - late > 0.6 * (never - always)
