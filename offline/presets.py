"""Presets of ``milo quantize``: one name for method, group size, ranks and calibration, for models of all sizes.

Groups of 128 spend the bytes that they save on ranks, which buys more accuracy than the scales of smaller groups where
no codes are learned. Where they are (``balanced``, ``best``), groups of 64 and few ranks leave the same KL at the same
bits (0.0697 and 0.0692 nats on real weights, 3.6 bits), and ranks cost more when they are served than scales
do: Mixtral's experts have ranks of 56 to 64 in place of 312. ``paper-s1`` and ``paper-s2`` are the paper's composites
(dense 512 or 1024 and kurtosis 16 or 32 on a hidden size of 4096).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ConversionError
from .nouns import Recipe
from .ranks.policies import Policy

LEAST_RANKS = 0.05
"""Bits a weight that smaller groups must leave for ranks, without which attention would have none."""

SERVED = 0.6
"""What compensators of presets that measure needs may cost a token over what codes cost it. It bounds no model of those
whose shares are known, 0.13 to 0.52: where 0.2 does, trained models of 22 and 25 M parameters lost 3 and 8 % in KL, and
what 0.3 costs models of many small experts has not been measured (``benchmarks/results/README.md``)."""


@dataclass(frozen=True)
class Preset:
    """A named choice.

    Attributes:
        method: of the recipe.
        group_size: weights that share a scale and a zero point, in matrices whose inputs it divides.
        learned_group_size: the same where codes are learned and the budget has room for it; None for no other.
        budget_bits: average stored bits of a weight, or None where the policies decide.
        serving_share: the most that compensators may cost in serving over what codes cost (:mod:`.served.target`).
        fractions: rank of each policy as a fraction of the hidden size.
        calibrated: whether a text goes through the model, where none is asked for.
        thorough: whether more of the text is used, and the whole model is trained where it fits into memory.
    """

    method: str
    group_size: int
    learned_group_size: int | None = None
    budget_bits: float | None = None
    serving_share: float | None = None
    fractions: tuple[tuple[str, float], ...] = ()
    calibrated: bool = False
    thorough: bool = False

    def groups(self, learned: bool, budget_bits: float | None) -> int:
        """Return the group size.

        Args:
            learned: whether codes are learned along a text.
            budget_bits: the user's, in place of the preset's.
        """
        budget = self.budget_bits if budget_bits is None else budget_bits
        small = self.learned_group_size
        fits = learned and small is not None and budget is not None and budget >= 3 + 32 / small + LEAST_RANKS
        return small if fits and small is not None else self.group_size

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
    "balanced": Preset("milo", 128, 64, budget_bits=3.6, serving_share=SERVED, calibrated=True),
    "best": Preset("milo", 128, 64, budget_bits=3.6, serving_share=SERVED, calibrated=True, thorough=True),
    "small": Preset("milo", 128, budget_bits=3.3, serving_share=SERVED, calibrated=True),
    "fast": Preset("milo", 128, budget_bits=3.6),
    "paper-s1": Preset("paper", 64, fractions=(("dense", 1 / 8), ("kurtosis", 1 / 256))),
    "paper-s2": Preset("paper", 64, fractions=(("dense", 1 / 4), ("kurtosis", 1 / 128))),
}
DEFAULT_PRESET = "balanced"
CALIBRATED_ROUNDS, PLAIN_ROUNDS = 2, 6
"""Of the solver, method ``milo``, with and without a calibration text."""


def milo_recipe(along: bool, **choices: Any) -> Recipe:
    """Return the recipe of method ``milo``.

    Args:
        along: whether a text goes through the model, so that inputs' second moments are known.
        choices: fields of the recipe that are decided otherwise.
    """
    rounds = CALIBRATED_ROUNDS if along else PLAIN_ROUNDS
    feedback_rounds, base = (1, Recipe.base) if along else (Recipe.feedback_rounds, "hqq")
    return Recipe(**{"max_rounds": rounds, "feedback_rounds": feedback_rounds, "base": base} | choices)
