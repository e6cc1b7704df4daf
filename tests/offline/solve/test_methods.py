"""The methods among themselves."""

from __future__ import annotations

import torch
from random_matrices import heavy_tailed

from vllm_milo.offline.nouns import METHODS, PLAIN_METHODS, Recipe
from vllm_milo.offline.solve.methods import quantize_matrices


def test_methods():
    weights = heavy_tailed(1, 64, 128)
    errors = {}
    for method in METHODS:
        rank = 0 if method in PLAIN_METHODS else 16
        errors[method] = float(quantize_matrices(weights, rank, Recipe(method), torch.bfloat16).errors)
    assert sorted(errors, key=lambda method: errors[method]) == ["milo", "paper", "mse", "hqq", "rtn"]
