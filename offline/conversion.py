"""What decides a conversion: the recipe, the ranks, the calibration text and where it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_milo.head.layout import PLAIN_BITS

from .checkpoint.card import CardNotes
from .checkpoint.report import MatrixReport
from .checkpoint.writer import SHARD_BYTES
from .learn.end_to_end import TuneOptions
from .learn.layer import LearnOptions
from .nouns import Recipe
from .ranks.plan import RankChoice
from .ranks.policies import Policy


@dataclass(frozen=True)
class Text:
    """A calibration text, and what is done with it.

    Attributes:
        name: what the checkpoint's recipe records of it.
        windows: token ids, int64 [W, T].
        learn: how the codes of each layer are learned.
        tune: how the whole model is trained after its layers, or None.
    """

    name: str
    windows: torch.Tensor
    learn: LearnOptions = field(default_factory=LearnOptions)
    tune: TuneOptions | None = None


@dataclass(frozen=True)
class Conversion:
    """Everything that decides a conversion's result, and where it runs.

    Attributes:
        recipe: method, group size, factor bits, rounds, seed.
        policies: rank policies, added up; with a budget they are scaled to fit it.
        budget_bits: average stored bits of a quantized weight, everything counted; without policies the ranks go
            by what a matrix is part of (see :mod:`.ranks.roles`).
        serving_share: the most that compensators may cost in serving over what codes cost, by measured costs of bytes
            (see :mod:`.served.target`); of ranks within a budget, without policies. None for no limit.
        measure_ranks: along a text and within a budget, without policies, share the ranks of each layer by what its
            roles need (see :mod:`.along.need`); the layer keeps its bits and gets its part of those that are left.
        splittable: within a budget, without policies, give experts that no tensor parallel size could cut smaller
            groups (see :func:`.planning.splits.narrow_groups`).
        text: a calibration text that goes through the model while it is converted (method ``milo``), or None.
        ignore: names or ``re:`` patterns of layers to keep unquantized, beside the family's own.
        lm_head_bits: 8 or 4 to store the output head as integers; 16 copies it.
        expert_counts: uses of each expert, by experts' name; for the frequency policy.
        device: where the arithmetic runs.
        more_devices: others of its kind, which solve a part of the matrices; the result is the same without.
        device_memory: most bytes to take on each device; None for what is free.
        shard_bytes: size of an output shard.
        overwrite: replace an existing MiLo checkpoint, and without ``resume`` the finished layers of a conversion that
            did not end.
        resume: go on with the finished layers of the same conversion, which did not end.
        card: what the model card says beside what the folders tell.
    """

    recipe: Recipe = field(default_factory=Recipe)
    policies: Sequence[Policy] = ()
    budget_bits: float | None = None
    serving_share: float | None = None
    measure_ranks: bool = True
    splittable: bool = False
    text: Text | None = None
    ignore: Sequence[str] = ()
    lm_head_bits: int = PLAIN_BITS
    expert_counts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    device: str = "cpu"
    more_devices: Sequence[str] = ()
    device_memory: int | None = None
    shard_bytes: int = SHARD_BYTES
    overwrite: bool = False
    resume: bool = False
    card: CardNotes = field(default_factory=CardNotes)

    @property
    def rank_choice(self) -> RankChoice:
        """What decides the ranks before the conversion."""
        return RankChoice(self.policies, self.budget_bits, self.expert_counts, self.serving_share)

    @property
    def measures_ranks(self) -> bool:
        """Whether ranks are shared by what the layers turn out to need."""
        return self.measure_ranks and self.text is not None and self.budget_bits is not None and not self.policies


class Summary(NamedTuple):
    """What a conversion did.

    Attributes:
        spent: seconds by what they were spent on, some beside each other: ``reading`` weights for the solver,
            ``solving`` by device, ``writing``; in ``waiting_for_jobs`` the first device had none, in
            ``waiting_for_the_disk`` finished layers had to wait.
    """

    out: Path
    seconds: float
    matrices: int
    bytes_written: int
    mean_error: float
    peak_host_bytes: int
    peak_device_bytes: int
    warnings: list[str]
    worst: Mapping[str, MatrixReport]
    spent: Mapping[str, Any]
