"""The report that lies in every checkpoint: what the conversion measured of each matrix and layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from ..nouns import Matrix

REPORT_NAME = "milo_report.json"
_MORE = "a longer text or one like what will be served reaches more of them"


class MatrixReport(NamedTuple):
    """What the solver says of one matrix: relative error, rank, rounds."""

    error: float
    rank: int
    rounds: int


class Mark(NamedTuple):
    """How much a report held at some time: matrices, layers, experts without tokens."""

    matrices: int
    layers: int
    unseen: int


@dataclass
class Report:
    """What a conversion measured.

    Attributes:
        matrices: by name, before codes are learned.
        layers: by name, what learning their codes did, as JSON.
        tuning: what training the whole model did, as JSON; empty without.
        unseen: routed experts that not one token of the calibration text reached.
    """

    matrices: dict[str, MatrixReport] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    tuning: dict[str, float] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)

    def note_tokens(self, matrices: Iterable[Matrix], tokens: Mapping[str, int]) -> None:
        """Note which experts of a layer no token reached, by the tokens that each of their matrices saw."""
        names = [matrix.name for matrix in matrices if tokens.get(matrix.name) == 0]
        self.unseen += dict.fromkeys(name.rpartition(".")[0] for name in names)

    def mark(self) -> Mark:
        """Return how much there is, for :meth:`since`."""
        return Mark(len(self.matrices), len(self.layers), len(self.unseen))

    def since(self, mark: Mark) -> dict[str, Any]:
        """Return what came after a mark, as JSON that :meth:`restore` takes."""
        return {
            "matrices": dict(islice(self.matrices.items(), mark.matrices, None)),
            "layers": dict(islice(self.layers.items(), mark.layers, None)),
            "unseen": self.unseen[mark.unseen :],
        }

    def restore(self, said: Mapping[str, Any]) -> None:
        """Take what :meth:`since` returned, in this process or another."""
        self.matrices |= {name: MatrixReport(*entry) for name, entry in said["matrices"].items()}
        self.layers |= said["layers"]
        self.unseen += said["unseen"]

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
        if self.unseen:
            content["experts_without_tokens"] = self.unseen
        if self.tuning:
            content["tuning"] = self.tuning
        return content
