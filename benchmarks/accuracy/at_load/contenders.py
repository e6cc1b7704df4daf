"""Ways to serve a 16-bit model that vLLM quantizes while it loads it, and the model as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_milo.offline.presets import PRESETS

REFERENCE = "bf16"
IGNORED = ("lm_head", r"re:.*\.gate$", r"re:.*\.router$", r"re:.*shared_expert_gate$")
"""What MiLo keeps in 16 bits, by the rules of vLLM's Humming: a head, and what routes."""


@dataclass(frozen=True)
class Contender:
    """A way to serve a model.

    Attributes:
        bits: stored bits of a quantized weight by the format's definition, None for 16 bits.
        engine: arguments of vLLM's ``LLM``.
        environment: variables of its process.
    """

    bits: float | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


def rounding(bits: int, group_size: int, zero_points: bool = False) -> Contender:
    """Return vLLM's own quantization at load: Humming's rounding to nearest, scales in 16 bits, integer zero points."""
    config = {"dtype": f"uint{bits}", "group_size": group_size, "has_zero_point": zero_points, "ignore": list(IGNORED)}
    return Contender(
        bits + (16 + bits * zero_points) / group_size,
        {"quantization": "humming"},
        {"VLLM_HUMMING_ONLINE_QUANT_CONFIG": json.dumps(config)},
    )


CONTENDERS = {
    REFERENCE: Contender(),
    "milo": Contender(PRESETS["fast"].budget_bits, {"quantization": "milo"}),
    "rtn3-g64": rounding(3, 64),
    "rtn3-g32": rounding(3, 32),
    "rtn4-g128": rounding(4, 128),
    "rtn3-g32-zeros": rounding(3, 32, zero_points=True),
}
"""``rtn3-g32-zeros`` has the bits of ``milo``, but vLLM 0.33's source refuses zero points where experts are loaded."""
