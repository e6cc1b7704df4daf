"""The report that lies in every checkpoint: what the conversion measured of each matrix and layer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch

from ..nouns import Matrix
from ..solve.base.group import SMALLEST_NORMAL

REPORT_NAME = "milo_report.json"
_SHOWN = 3
_MORE = "a longer text or one like what will be served reaches more of them"


class MatrixReport(NamedTuple):
    """What the solver says of one matrix: relative error, rank, rounds."""

    error: float
    rank: int
    rounds: int


class Mark(NamedTuple):
    """How much a report held at some time; each number is that of the attribute of this name."""

    matrices: int
    layers: int
    needs: int
    unseen: int
    zero: int
    tiny: int


@dataclass
class Report:
    """What a conversion measured.

    Attributes:
        matrices: by name, before codes are learned.
        layers: by name, what learning their codes did, as JSON.
        needs: by layer, what its roles need and the ranks that they got for it, as JSON.
        tuning: what training the whole model did, as JSON; empty without.
        unseen: routed experts that not one token of the calibration text reached.
        zero: matrices without a weight other than 0.
        tiny: matrices so small that their scales lie below fp16's normal range.
    """

    matrices: dict[str, MatrixReport] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    needs: dict[str, dict[str, Any]] = field(default_factory=dict)
    tuning: dict[str, float] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)
    zero: list[str] = field(default_factory=list)
    tiny: list[str] = field(default_factory=list)

    def note_sizes(self, matrices: Sequence[Matrix], weights: torch.Tensor, scales: torch.Tensor) -> None:
        """Note which matrices of a batch are zero or tiny.

        Args:
            matrices: of the batch.
            weights: theirs, float32 [B, N, K].
            scales: of their groups as stored, fp16 [B, N, G].
        """
        size = torch.linalg.vector_norm(weights.flatten(1), dim=1) / math.sqrt(weights[0].numel())
        small = (scales < SMALLEST_NORMAL).flatten(1).any(1) & (size < 8 * SMALLEST_NORMAL) & (size > 0)
        for matrix, is_zero, is_small in zip(matrices, (size == 0).tolist(), small.tolist(), strict=True):
            if is_zero or is_small:
                (self.zero if is_zero else self.tiny).append(matrix.name)

    def add(self, other: Report) -> None:
        """Take all that another report says, after what this one does."""
        self.restore(other.since(Report().mark()))

    def note_tokens(self, matrices: Iterable[Matrix], tokens: Mapping[str, int]) -> None:
        """Note which experts of a layer no token reached, by the tokens that each of their matrices saw."""
        names = [matrix.name for matrix in matrices if tokens.get(matrix.name) == 0]
        self.unseen += dict.fromkeys(name.rpartition(".")[0] for name in names)

    def note_needs(self, layer: str, needs: dict[str, Any]) -> None:
        """Note what was measured of the roles of a layer, if anything was."""
        if needs:
            self.needs[layer] = needs

    def worst(self, number: int = 5) -> dict[str, MatrixReport]:
        """Return the matrices with the largest relative errors, these first."""
        return dict(sorted(self.matrices.items(), key=lambda held: -held[1].error)[:number])

    def mark(self) -> Mark:
        """Return how much there is, for :meth:`since`."""
        return Mark(*(len(getattr(self, name)) for name in Mark._fields))

    def since(self, mark: Mark) -> dict[str, Any]:
        """Return what came after a mark, as JSON that :meth:`restore` takes."""
        return {name: _after(getattr(self, name), number) for name, number in mark._asdict().items()}

    def restore(self, said: Mapping[str, Any]) -> None:
        """Take what :meth:`since` returned, in this process or another."""
        self.matrices |= {name: MatrixReport(*entry) for name, entry in said["matrices"].items()}
        self.layers |= said["layers"]
        self.needs |= said["needs"]
        self.unseen += said["unseen"]
        self.zero += said["zero"]
        self.tiny += said["tiny"]

    @property
    def warnings(self) -> list[str]:
        """What a user should know of the learning."""
        few = {name.rpartition(".")[0] for layer in self.layers.values() for name in layer["untrained_experts"]}
        few -= set(self.unseen)
        found = []
        if self.unseen:
            found.append(
                f"{len(self.unseen)} routed experts saw not one token of the calibration text and are quantized as "
                f"without one, e.g. {self.unseen[0]}; {_MORE}"
            )
        if few:
            found.append(
                f"{len(few)} routed experts saw too little of the calibration text and keep the solver's codes, "
                f"e.g. {min(few)}; {_MORE}"
            )
        if self.zero:
            found.append(f"{_some(self.zero)}: all weights are 0, and are stored as that; was the source pruned?")
        if self.tiny:
            found.append(
                f"{_some(self.tiny)}: so small that scales lie below fp16's normal range; stored as exactly as that "
                f"allows ({REPORT_NAME} has the error of each)"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return what the report file holds."""
        content: dict[str, Any] = {
            "relative_error": "|W - W'| / |W|, Frobenius, everything as stored, before codes are learned",
            "matrices": {name: entry._asdict() for name, entry in self.matrices.items()},
        }
        if self.layers:
            content["learned"] = (
                "squared error of a layer's output, each token's divided by its energy, on windows that were not "
                "trained on, before and after; experts that saw too few tokens to be trained"
            )
            content["layers"] = self.layers
        if self.needs:
            content["measured"] = (
                "squared error of a layer's output, each token's divided by its energy, where one role alone is "
                "quantized without a compensator; share of the role's error that is left, by rank; rank that it got"
            )
            content["needs"] = self.needs
        if self.unseen:
            content["experts_without_tokens"] = self.unseen
        if self.tuning:
            content["tuning"] = self.tuning
        return content


def _some(names: Sequence[str]) -> str:
    """Return matrices as text: the experts that hold them, and other matrices by themselves; at most three."""
    owners = list(dict.fromkeys(re.sub(r"(\.experts\.\d+)\.[^.]+$", r"\1", name) for name in names))
    more = f" and {len(owners) - _SHOWN} more" if len(owners) > _SHOWN else ""
    return ", ".join(owners[:_SHOWN]) + more


def _after(held: dict[str, Any] | list[str], number: int) -> dict[str, Any] | list[str]:
    """Return what came after the first ``number`` entries."""
    return held[number:] if isinstance(held, list) else dict(islice(held.items(), number, None))
