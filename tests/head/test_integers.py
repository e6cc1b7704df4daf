"""Integers of a quantized head: scales, and the weights that they stand for."""

from __future__ import annotations

import pytest
import torch

from vllm_milo.kernels.integers import dequantize_integers, pack_integers
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.solve import output_head
from vllm_milo.offline.solve.output_head import quantize_head

CPU = torch.device("cpu")


def quantize(weight: torch.Tensor, bits: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, scales = zip(*quantize_head(weight, bits, groups, CPU), strict=True)
    return torch.cat(values), torch.cat(scales)


def restored(weight: torch.Tensor, bits: int, groups: int) -> torch.Tensor:
    values, scale = quantize(weight, bits, groups)
    return dequantize_integers(pack_integers(values, bits), scale, bits)


@pytest.mark.parametrize(("bits", "groups", "plain"), [(8, 1, 127), (4, 4, 7)])
def test_scales_are_better_than_those_of_the_largest_value(bits: int, groups: int, plain: int):
    """And every dtype that a model may have holds them exactly."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    _, scale = quantize(weight, bits, groups)
    assert torch.equal(scale.bfloat16().half(), scale)
    held = weight.unflatten(-1, (groups, -1))
    largest = held.abs().amax(-1, keepdim=True) / plain
    usual = ((held / largest).round() * largest).flatten(-2)
    errors = [float((weight - found).square().sum()) for found in (restored(weight, bits, groups), usual)]
    assert errors[0] < (0.8 if bits == 4 else 1.0) * errors[1]


def test_rows_are_worked_on_in_parts(monkeypatch: pytest.MonkeyPatch):
    weight = torch.randn(33, 64, generator=torch.Generator().manual_seed(0))
    whole = quantize(weight, 4, 2)
    monkeypatch.setattr(output_head, "WEIGHTS_AT_ONCE", 64 * 10)
    assert len(list(quantize_head(weight, 4, 2, CPU))) == 4
    assert all(torch.equal(one, other) for one, other in zip(quantize(weight, 4, 2), whole, strict=True))


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_and_the_smallest_and_largest_weights(bits: int):
    weight = torch.zeros(4, 64)
    weight[1] = 1e-7
    weight[2, ::3] = 3.0
    weight[3, 5] = -30000.0
    found = restored(weight, bits, 1 if bits == 8 else 2)
    assert torch.equal(found[0], weight[0])
    assert (found - weight).abs().max() <= 1e-2 * weight.abs().max()
    assert (found[1] - weight[1]).abs().max() <= 1e-7


def test_weights_beyond_fp16_are_refused():
    with pytest.raises(ConversionError, match="--lm-head-bits 16"):
        quantize(torch.full((2, 64), 1e9), 4, 2)
