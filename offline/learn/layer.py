"""Trains the quantized state of one decoder layer on what the layer puts out.

The layer runs on hidden states that the quantized layers before it made, and its output is compared with that of the
original model. Each token's squared error is divided by the energy of its own output, since a few tokens of huge norm
would drown the others. Everything stays in the format: only codes, scales, zero points and factors change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..nouns import Matrix
from ..progress import within
from ..solve.methods import Solved
from ..source.streamed_model import StreamedModel
from .groups import make_groups, step_groups
from .latents import Pace, Rates
from .repeat import Repeat
from .repeatable import repeatable

CHECK_SHARE = 16
"""One window of so many is kept apart, to tell whether training helped."""


@dataclass(frozen=True)
class LearnOptions:
    """How a layer is trained.

    Attributes:
        steps: of Adam; 0 for none.
        batch: windows of a step.
        seed: of the choice of windows.
        rates: learning rates.
    """

    steps: int = 200
    batch: int = 8
    seed: int = 0
    rates: Rates = field(default_factory=Rates)


class LearnReport(NamedTuple):
    """What training did to a layer: its loss on windows kept apart, before and after, and which experts it left out."""

    before: float
    after: float
    untrained_experts: list[str]


def learn_layer(
    model: StreamedModel,
    index: int,
    module: torch.nn.Module,
    solved: Mapping[Matrix, Solved],
    states: torch.Tensor,
    target: torch.Tensor,
    tokens: Mapping[str, int],
    bits: int,
    options: LearnOptions,
) -> tuple[dict[Matrix, Solved], LearnReport]:
    """Train the matrices of a layer.

    Args:
        model: whose layer it is.
        index: of the layer.
        module: the layer with its original weights, which are overwritten.
        solved: what the solver made of the layer's matrices.
        states: hidden states before the layer in the quantized model, [W, T, H].
        target: hidden states after the layer in the original model, [W, T, H].
        tokens: of the calibration text that each routed expert saw, by the name of its matrices.
        bits: of the factors.
        options: steps, windows, rates.

    Returns:
        The trained matrices, or the solver's where training did not lower the loss on the windows kept apart.
    """
    own = dict(module.named_parameters())
    parameters = {name: own[mine] for name, mine in model.parameters(index, module).items()}
    groups = make_groups(model.place, parameters, solved, tokens, bits)
    check = torch.arange(len(states)) % CHECK_SHARE == CHECK_SHARE - 1
    if not check.any() or check.all():
        check = torch.ones(len(states), dtype=torch.bool)
    loss = LayerLoss(model, index, module, states, target)
    for group in groups:
        group.write()
    checked = check.nonzero().flatten()
    before = loss.mean(checked, options.batch)
    train = (~check).nonzero().flatten() if not check.all() else torch.arange(len(states))
    pace, generator = Pace(states.device), torch.Generator().manual_seed(options.seed + index)
    batch = loss.batch(min(options.batch, len(train)))

    def body() -> None:
        with repeatable(states.device):
            step_groups(groups, batch.loss, options.rates, pace)

    step = Repeat(body, states.device)
    for number in within(range(options.steps), "learn"):
        batch.fill(train[torch.randperm(len(train), generator=generator)[: len(batch)]])
        pace.set(number, options.steps)
        step()
    after = loss.mean(checked, options.batch)
    untrained = [matrix.name for group in groups for matrix in group.untrained]
    if not after < before:
        return dict(solved), LearnReport(before, before, untrained)
    learned = {matrix: one for group in groups for matrix, one in group.stored().items()}
    return learned, LearnReport(before, after, untrained)


class LayerLoss:
    """The loss of a layer: squared errors of its output, each token's divided by the energy of its output."""

    def __init__(
        self, model: StreamedModel, index: int, module: torch.nn.Module, states: torch.Tensor, target: torch.Tensor
    ) -> None:
        self.run = lambda part: model.run(index, module, part)
        self.states, self.target = states, target
        energy = torch.cat([part.float().square().mean(-1, keepdim=True) for part in target.split(8)])
        self.weight = energy.clamp(min=1e-12).reciprocal()

    def batch(self, size: int) -> _Batch:
        """Return a batch of ``size`` windows, to be filled."""
        return _Batch(self, size)

    @torch.no_grad()
    def mean(self, windows: torch.Tensor, size: int) -> float:
        """Return the mean loss of windows, ``size`` at a time."""
        total = 0.0
        for part in windows.split(size):
            batch = self.batch(len(part))
            batch.fill(part)
            total += float(batch.loss()) * len(part)
        return total / len(windows)


class _Batch:
    """Some windows in tensors that stay where they are."""

    def __init__(self, of: LayerLoss, size: int) -> None:
        self._of = of
        self._states, self._target, self._weight = (
            torch.empty(size, *tensor.shape[1:], dtype=tensor.dtype, device=of.states.device)
            for tensor in (of.states, of.target, of.weight)
        )

    def __len__(self) -> int:
        return len(self._states)

    def fill(self, windows: torch.Tensor) -> None:
        """Take the windows with these numbers."""
        of = self._of
        for mine, all_ in ((self._states, of.states), (self._target, of.target), (self._weight, of.weight)):
            mine.copy_(all_[windows.to(all_.device)])

    def loss(self) -> torch.Tensor:
        """Return the mean loss of the batch."""
        error = self._of.run(self._states).float() - self._target.float()
        return (error.square() * self._weight).mean()
