"""Families as wide as their makers' models, two layers of them: vLLM as users run it, beside the unquantized control.

``python tests/wide_families.py`` prints the same comparison as a table. On CPUs a like of a fraction of the width runs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm_jobs import DEVICE
from wide_families import CONTROL, OPTIONS, WIDE, measure

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]
WIDTHS = [pytest.param(True, id="small"), pytest.param(False, id="true", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("small", WIDTHS)
@pytest.mark.parametrize("name", WIDE)
def test_is_as_the_dequantized_model(name: str, small: bool, tmp_path: Path):
    if name.startswith("qwen3_5"):
        pytest.importorskip("torchvision", reason="vLLM imports it for Qwen3.5")
    found = measure(name, tmp_path, small)
    control = found.apart[CONTROL]
    print(name, {kind: str(apart) for kind, apart in found.apart.items()})
    for kind in OPTIONS:
        apart = found.apart[kind]
        assert apart.mean < 1.5 * control.mean + 0.01, f"{kind}: {apart}, the control {control}"
        for share in apart.missing:
            assert abs(share) < 0.3, f"{kind}: {apart}, the control {control}"
    if DEVICE == "cuda":
        assert "milo::fused_moe on cuda runs on the triton backend" in found.log
        assert "Capturing CUDA graphs" in found.log or "Graph capturing finished" in found.log
