"""Moments of what a text never reaches."""

from __future__ import annotations

import torch

from vllm_milo.offline.calibration.text_moments import Moment
from vllm_milo.offline.nouns import Moments, Recipe
from vllm_milo.offline.solve.methods import quantize_matrices


def test_an_expert_that_the_text_never_reaches_is_quantized_by_plain_squares():
    moment = Moment(64).shrunk(torch.device("cpu"))[None]
    weights = torch.randn(1, 64, 64)
    with_moments, without = (
        quantize_matrices(weights, 8, Recipe(max_rounds=3), torch.bfloat16, given)
        for given in (Moments(moment, moment), Moments())
    )
    assert float(with_moments.errors) < 1.1 * float(without.errors)
