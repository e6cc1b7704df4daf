"""What a conversion works with: the model, the devices, the report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from .batches import Rule
from .calibration.memory import SIMPLE, Layout, States
from .checkpoint.matrices import Result
from .checkpoint.report import Report
from .learn.layer import Spread
from .nouns import Matrix, Recipe
from .progress import doing
from .source.reader import ModelReader
from .source.states import StatesHome
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
        layout: of a conversion along a text in memory.
        scratch: folder for what memory is too small for, where the layout puts anything on the disk.
    """

    reader: ModelReader
    devices: Devices
    batch_weights: int
    report: Report
    progress: bool
    layout: Layout = SIMPLE
    scratch: Path | None = None

    @property
    def device(self) -> torch.device:
        """Return the device of everything that is not spread."""
        return self.devices.first

    @property
    def states_home(self) -> StatesHome:
        """Return where the hidden states of a text lie."""
        if self.layout.states == States.DEVICE:
            return StatesHome(self.device)
        return StatesHome(torch.device("cpu"), self.scratch if self.layout.states == States.DISK else None)

    @property
    def spread(self) -> Spread:
        """Return how the training of a layer is spread."""
        number = self.layout.devices
        return Spread(self.layout.rounds, self.devices.all[:number] if number > 1 else ())

    def rule(self, recipe: Recipe) -> Rule:
        """Return which matrices a recipe's solver gets together."""
        return Rule(self.batch_weights, recipe.method == "milo")

    def noted(self, results: Iterable[Done]) -> Iterator[tuple[Matrix, Result]]:
        """Yield the solved matrices, and put what there is to say of each into the report when its turn comes."""
        for done in results:
            doing("solve", done.solved[-1][0].name)
            self.report.add(done.report)
            yield from done.solved
