"""What decides a conversion: the recipe, the ranks and where it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .calibration.moment_source import MomentSource, PlainSquares
from .checkpoint.writer import SHARD_BYTES
from .learn.layer import LearnOptions
from .nouns import Recipe
from .ranks.policies import Policy


@dataclass(frozen=True)
class Conversion:
    """Everything that decides a conversion's result, and where it runs.

    Attributes:
        recipe: method, group size, factor bits, rounds, seed.
        policies: rank policies, added up; with a budget they are scaled to fit it.
        budget_bits: average stored bits of a quantized weight, everything counted; without policies the ranks
            come from measured spectra (see :mod:`.allocation`).
        calibration: second moments that weigh errors, for method ``milo``.
        windows: token ids int64 [W, T] of a calibration text that goes through the model while it is converted, or None.
        learn: how codes are learned on it.
        ignore: names or ``re:`` patterns of layers to keep unquantized, beside the family's own.
        expert_counts: uses of each expert, by experts' name; for the frequency policy.
        device: where the arithmetic runs.
        shard_bytes: size of an output shard.
        overwrite: replace an existing output folder.
    """

    recipe: Recipe = field(default_factory=Recipe)
    policies: Sequence[Policy] = ()
    budget_bits: float | None = None
    calibration: MomentSource = field(default_factory=PlainSquares)
    windows: torch.Tensor | None = None
    learn: LearnOptions = field(default_factory=LearnOptions)
    ignore: Sequence[str] = ()
    expert_counts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    device: str = "cpu"
    shard_bytes: int = SHARD_BYTES
    overwrite: bool = False
