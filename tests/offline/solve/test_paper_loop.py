"""The published loop: when it stops, what it gains, and what it reports."""

from __future__ import annotations

import torch
from random_matrices import heavy_tailed

from vllm_milo.offline.nouns import Recipe
from vllm_milo.offline.solve.methods import quantize_matrices
from vllm_milo.offline.solve.paper_loop import _Progress

PAPER = Recipe("paper")


def test_stop_rule():
    progress = _Progress(torch.ones(3, dtype=torch.bool))
    for step in range(8):
        progress.record(torch.tensor([0.9**step, 1.0, 1.0 + 0.1 * step]))
    # the first still improves; the flat and the diverging one have stopped
    assert progress.active.tolist() == [True, False, False]


def test_stop_rule_needs_two_windows():
    progress = _Progress(torch.ones(1, dtype=torch.bool))
    for _ in range(3):
        progress.record(torch.tensor([1.0]))
    assert progress.active.tolist() == [True]
    progress.record(torch.tensor([1.0]))
    assert progress.active.tolist() == [False]


def test_milo_reduces_the_error_and_reports_it():
    weights = heavy_tailed(3, 128, 192)
    plain = quantize_matrices(weights, 0, PAPER, torch.bfloat16)
    result = quantize_matrices(weights, 32, Recipe("paper", factor_bits=8), torch.bfloat16)
    assert (result.errors < 0.9 * plain.errors).all()
    expected = (weights - result.dequantize()).flatten(1).norm(dim=1) / weights.flatten(1).norm(dim=1)
    assert torch.allclose(result.errors, expected)
    assert (result.rounds >= 4).all()
    assert (result.rounds <= 20).all()


def test_batches_do_not_mix_matrices():
    weights = heavy_tailed(3, 64, 128)
    together = quantize_matrices(weights, 16, PAPER, torch.bfloat16)
    alone = [quantize_matrices(matrix[None], 16, PAPER, torch.bfloat16) for matrix in weights]
    assert torch.allclose(together.errors, torch.cat([one.errors for one in alone]), rtol=1e-4)
    assert torch.equal(together.rounds, torch.cat([one.rounds for one in alone]))
