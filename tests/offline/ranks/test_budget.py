"""Bits of the format."""

from __future__ import annotations

import pytest

from vllm_milo.offline.nouns import Kind, Matrix, Recipe
from vllm_milo.offline.ranks.budget import base_bits, least_bits, name_groups, rank_bits, stored_bits

MATRICES = [Matrix(f"m{index}", Kind.ATTENTION, 256, 256) for index in range(4)]


def test_bits_of_the_format():
    assert base_bits(64) == 3.5
    assert base_bits(128) == 3.25
    assert rank_bits(MATRICES[0], 3) == 512 * 3.25
    assert rank_bits(MATRICES[0], 16) == 512 * 16


def test_each_matrix_counts_in_its_own_groups():
    """Three quarters of the weights have inputs that groups of 128 do not divide."""
    matrices = [Matrix("q", Kind.ATTENTION, 256, 192), Matrix("down", Kind.DENSE_FFN, 64, 256)]
    recipe = Recipe(group_size=128)
    assert least_bits(matrices, recipe) == 0.75 * 3.5 + 0.25 * 3.25
    assert name_groups(matrices, recipe) == "group sizes 128 and 64"
    factors = 8 * rank_bits(matrices[0], 3) / (256 * 256)
    assert stored_bits(matrices, {"q": 8, "down": 0}, recipe) == pytest.approx(least_bits(matrices, recipe) + factors)
    assert least_bits(matrices[1:], recipe) == 3.25
    assert name_groups(matrices[1:], recipe) == "group size 128"
