"""Half-quadratic quantization: better than rounding, and the same on a GPU."""

from __future__ import annotations

import pytest
import torch
from random_matrices import heavy_tailed

from vllm_milo.offline.solve.base import hqq
from vllm_milo.offline.solve.base.group import quantize_rtn
from vllm_milo.offline.solve.base.hqq import quantize_hqq


def test_hqq_beats_rtn():
    weights = heavy_tailed(4, 128, 256)
    errors = [(quantize(weights, 64).dequantize() - weights).abs().mean() for quantize in (quantize_hqq, quantize_rtn)]
    assert errors[0] < 0.97 * errors[1]


def test_tiny_groups_of_a_normal_matrix_are_kept():
    weights = heavy_tailed(1, 64, 128)
    weights[0, 0, :64] *= 1e-6
    weights[0, 1, :64] = 3e-7
    result = quantize_hqq(weights, 64)
    assert (result.dequantize()[0, :2, :64] - weights[0, :2, :64]).abs().max() < 2.0**-14


def test_a_round_after_the_last_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    """On a GPU the host hears of the round before the last."""
    weights = heavy_tailed(3, 65, 384)
    asked = []

    def never(self: object, improved: torch.Tensor) -> bool:
        asked.append(bool(improved.any()))
        return False

    expected = quantize_hqq(weights, 64)
    monkeypatch.setattr(hqq._Settled, "after", never)
    found = quantize_hqq(weights, 64)
    assert not all(asked[:-2])  # it had settled before
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_gpu_finds_the_zero_points_of_a_cpu(group):
    weights = heavy_tailed(3, 65, 384)
    weights[1, 7, :group] = 0.25
    here, there = quantize_hqq(weights, group), quantize_hqq(weights.cuda(), group)
    assert torch.equal(here.scale, there.scale.cpu())
    assert torch.allclose(here.zero.float(), there.zero.cpu().float(), atol=0.02)
    assert (here.codes != there.codes.cpu()).float().mean() < 0.01
