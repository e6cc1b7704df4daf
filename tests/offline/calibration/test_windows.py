"""Windows of a text."""

from __future__ import annotations

import pytest
import torch

from vllm_milo.offline.calibration.windows import spread_windows
from vllm_milo.offline.errors import ConversionError


def test_windows_are_spread():
    windows = spread_windows(torch.arange(1000), 4, length=100)
    assert windows[:, 0].tolist() == [0, 200, 500, 700]
    assert spread_windows(torch.arange(250), 64, length=100).shape == (2, 100)
    with pytest.raises(ConversionError, match="has 50 tokens; it needs at least 100"):
        spread_windows(torch.arange(50), 1, length=100)
