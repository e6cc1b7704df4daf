"""Statistics that ranks are planned by."""

from __future__ import annotations

import pytest
import torch

from vllm_milo.offline.ranks.plan import excess_kurtosis


def test_kurtosis():
    assert excess_kurtosis(torch.randn(512, 512)) == pytest.approx(0, abs=0.05)
    assert excess_kurtosis(torch.rand(512, 512)) == pytest.approx(-1.2, abs=0.02)
    assert excess_kurtosis(torch.ones(8, 8)) == 0
