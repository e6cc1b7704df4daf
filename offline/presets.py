"""Presets of ``milo quantize``: one name for method, group size and ranks, the same on small and large models.

``balanced``, ``best`` and ``small`` store groups of 128 and spend the bytes that this saves on ranks, which buys more
accuracy than the scales of smaller groups on every model measured. ``paper-s1`` and ``paper-s2`` are the
paper's composites (dense 512 or 1024 and kurtosis 16 or 32 on a hidden size of 4096).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ConversionError
from .ranks.policies import Policy


@dataclass(frozen=True)
class Preset:
    """A named choice.

    Attributes:
        method: of the recipe.
        group_size: weights that share a scale and a zero point.
        budget_bits: average stored bits of a weight, or None where the policies decide.
        fractions: rank of each policy as a fraction of the hidden size.
        calibrated: whether it weighs errors by a text, the model's own where none is given.
    """

    method: str
    group_size: int
    budget_bits: float | None = None
    fractions: tuple[tuple[str, float], ...] = ()
    calibrated: bool = False

    def policies(self, config: Mapping[str, Any]) -> list[Policy]:
        """Return the rank policies for a model.

        Raises:
            ConversionError: config.json has no hidden_size.
        """
        if not self.fractions:
            return []
        hidden = config.get("hidden_size")
        if not isinstance(hidden, int) or hidden < 1:
            raise ConversionError("config.json: no hidden_size, which the preset's ranks are fractions of; use --ranks")
        return [Policy(name, max(1, round(hidden * fraction))) for name, fraction in self.fractions]


PRESETS = {
    "paper-s1": Preset("paper", 64, fractions=(("dense", 1 / 8), ("kurtosis", 1 / 256))),
    "paper-s2": Preset("paper", 64, fractions=(("dense", 1 / 4), ("kurtosis", 1 / 128))),
    "balanced": Preset("milo", 128, budget_bits=3.6),
    "best": Preset("milo", 128, budget_bits=3.6, calibrated=True),
    "small": Preset("milo", 128, budget_bits=3.4),
}
DEFAULT_PRESET = "balanced"
