"""Bytes on the device, by their formula and by the tensors that the kernels are given."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from random_layers import random_experts, random_linear

from vllm_milo.kernels.resident import resident_bytes
from vllm_milo.kernels.serving.layout import KernelWeights, prepare_experts, prepare_linear

TABLES = ("rank_blocks", "u_starts", "norms", "exponents")


def held(layer: KernelWeights) -> int:
    """Return the bytes of all tensors but the tables."""
    tables = sum(getattr(layer, name).nbytes for name in TABLES)
    return sum(tensor.nbytes for tensor in layer.present) - tables


@pytest.mark.parametrize("bits", [3, 8, 16])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("ranks", [[[16, 8], [0, 0], [40, 24]], [[0], [8], [17]]], ids=str)
def test_experts(ranks: Sequence[Sequence[int]], group: int, bits: int):
    parts, width, k = len(ranks[0]), 192, 256
    layer = prepare_experts(random_experts(ranks, parts * width, k, group, bits), bits)
    wanted = sum(resident_bytes(width, k, rank, group, bits) for expert in ranks for rank in expert)
    assert held(layer) == wanted


@pytest.mark.parametrize("bits", [3, 8, 16])
def test_parts_of_a_dense_layer(bits: int):
    widths, ranks = [128, 64, 64], [24, 64, 0]
    layer, spec = random_linear(widths, ranks, 320, 64, bits)
    assert held(prepare_linear(layer, spec)) == sum(
        resident_bytes(n, 320, rank, 64, bits) for n, rank in zip(widths, ranks, strict=True)
    )


def test_sizes_that_fill_no_tile():
    found = held(prepare_experts(random_experts([[0]] * 2, 96, 32, 32, 3), 3))
    assert found == 2 * resident_bytes(96, 32, 0, 32, 3) == 2 * resident_bytes(128, 128, 0, 32, 3)


def test_rank_8_takes_what_rank_16_takes():
    stored = (4096 + 14336) * 3.25 / 8  # of one rank
    eight, sixteen = (
        resident_bytes(4096, 14336, rank, 64, 3) - resident_bytes(4096, 14336, 0, 64, 3) for rank in (8, 16)
    )
    assert eight == sixteen
    assert eight / (8 * stored) == pytest.approx(2.137, abs=0.001)
