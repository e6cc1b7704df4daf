"""Bits of the format."""

from __future__ import annotations

from vllm_milo.offline.nouns import Kind, Matrix
from vllm_milo.offline.ranks.budget import base_bits, rank_bits

MATRICES = [Matrix(f"m{index}", Kind.ATTENTION, 256, 256) for index in range(4)]


def test_bits_of_the_format():
    assert base_bits(64) == 3.5
    assert base_bits(128) == 3.25
    assert rank_bits(MATRICES[0], 3) == 512 * 3.25
    assert rank_bits(MATRICES[0], 16) == 512 * 16
