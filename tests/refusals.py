"""Conversions that must fail, and leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.nouns import Recipe

FAST = Recipe(max_rounds=1)
WEIGHTS = "model.safetensors"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def refused(source: Path, out: Path, message: str, conversion: Conversion | None = None, error=ConversionError) -> None:
    """Assert that a conversion fails with this message and leaves nothing behind."""
    with pytest.raises(error, match=message):
        convert(source, out, conversion or Conversion(FAST), progress=False)
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}.*"))
