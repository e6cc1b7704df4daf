"""What a conversion works with: the model, the devices, the report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from .batches import Rule
from .checkpoint.matrices import Result
from .checkpoint.report import Report
from .nouns import Matrix, Recipe
from .progress import doing
from .source.reader import ModelReader
from .spread.devices import Devices
from .spread.job import Done


class Bench(NamedTuple):
    """What a conversion works with.

    Attributes:
        reader: the source model.
        devices: where the arithmetic runs.
        batch_weights: most weights that the solver gets at once.
        report: takes what there is to say of each matrix, with the rank that it got.
        progress: show progress bars.
    """

    reader: ModelReader
    devices: Devices
    batch_weights: int
    report: Report
    progress: bool

    @property
    def device(self) -> torch.device:
        """Return the device of everything that is not spread."""
        return self.devices.first

    def rule(self, recipe: Recipe) -> Rule:
        """Return which matrices a recipe's solver gets together."""
        return Rule(self.batch_weights, recipe.method == "milo")

    def noted(self, results: Iterable[Done]) -> Iterator[tuple[Matrix, Result]]:
        """Yield the solved matrices, and put what there is to say of each into the report when its turn comes."""
        for done in results:
            doing("solve", done.solved[-1][0].name)
            self.report.add(done.report)
            yield from done.solved
