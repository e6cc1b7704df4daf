"""Trains the quantized state of one decoder layer on what the layer puts out.

The layer runs on hidden states that the quantized layers before it made, and its output is compared with that of the
original model. Each token's squared error is divided by the energy of its own output, since a few tokens of huge norm
would drown the others. Everything stays in the format: only codes, scales, zero points and factors change.

Where the trained state of all experts fills the device, other devices hold a part of it, which gives the same result;
or experts are trained in rounds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..nouns import Matrix
from ..progress import within
from ..solve.methods import Solved
from ..source.streamed_model import StreamedModel
from .groups import Group, Paces, gradients_of, make_groups, move_groups, step_groups
from .latents import Rates
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


class Spread(NamedTuple):
    """How the training of a layer is spread where its state is large.

    Attributes:
        rounds: parts of its experts that are trained one after the other, each beside the trained ones before it and
            the original ones after it.
        devices: that hold the state of experts, a part each; by default the layer's own.
    """

    rounds: int = 1
    devices: Sequence[torch.device] = ()


ALONE = Spread()


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
    spread: Spread = ALONE,
) -> tuple[dict[Matrix, Solved], LearnReport]:
    """Train the matrices of a layer.

    Args:
        model: whose layer it is.
        index: of the layer.
        module: the layer with its original weights, which are overwritten.
        solved: what the solver made of the layer's matrices, on any device.
        states: hidden states before the layer in the quantized model, [W, T, H], on any device.
        target: hidden states after the layer in the original model, [W, T, H].
        tokens: of the calibration text that each routed expert saw, by the name of its matrices.
        bits: of the factors.
        options: steps, windows, rates.
        spread: over rounds and devices.

    Returns:
        The trained matrices; of a round in which training did not lower the loss on the windows kept apart, the
        solver's.
    """
    own = dict(module.named_parameters())
    parameters = {name: own[mine] for name, mine in model.parameters(index, module).items()}
    training = _Training(LayerLoss(model, index, module, states, target), index, options)
    learned, earlier, before, after, untrained = dict(solved), 0.0, 0.0, 0.0, []
    for matrices in in_rounds(solved, spread.rounds):
        earlier += before - after
        theirs = {matrix: solved[matrix] for matrix in matrices}
        groups = make_groups(model.place, parameters, theirs, tokens, bits, spread.devices)
        untrained += [matrix.name for group in groups for matrix in group.untrained]
        before, after = training.run(groups)
        if after < before:
            learned |= {matrix: one.to(_device(theirs)) for group in groups for matrix, one in group.stored().items()}
        else:
            after = before
            held = {name: parameter.data for name, parameter in parameters.items()}
            model.fill(held, ((matrix, one.dequantize()) for matrix, one in theirs.items()))
    return learned, LearnReport(earlier + before, after, untrained)


def in_rounds(matrices: Iterable[Matrix], rounds: int) -> list[list[Matrix]]:
    """Return a layer's matrices in at most so many parts: those of some experts each, all others in the first."""
    held = list(matrices)
    size = -(-(1 + max((matrix.expert or 0 for matrix in held), default=0)) // rounds)
    parts = defaultdict(list)
    for matrix in held:
        parts[(matrix.expert or 0) // size].append(matrix)
    return [parts[number] for number in sorted(parts)]


def _device(solved: Mapping[Matrix, Solved]) -> torch.device:
    return next(iter(solved.values())).base.codes.device


class _Training:
    """Trains parts of one layer on the same windows.

    Args:
        loss: of the layer.
        index: of the layer.
        options: steps, windows, rates.
    """

    def __init__(self, loss: LayerLoss, index: int, options: LearnOptions) -> None:
        self._loss, self._options = loss, options
        number = len(loss.states)
        check = torch.arange(number) % CHECK_SHARE == CHECK_SHARE - 1
        if not check.any() or check.all():
            check = torch.ones(number, dtype=torch.bool)
        self._checked = check.nonzero().flatten()
        self._train = (~check).nonzero().flatten() if not check.all() else torch.arange(number)
        self._generator = torch.Generator().manual_seed(options.seed + index)

    def run(self, groups: Sequence[Group]) -> tuple[float, float]:
        """Train some groups; return the loss on the windows kept apart, before and after."""
        loss, options = self._loss, self._options
        for group in groups:
            group.write()
        before = loss.mean(self._checked, options.batch)
        batch, paces = loss.batch(min(options.batch, len(self._train))), Paces(groups)
        step = _step(groups, batch, options.rates, paces, loss.device)
        for number in within(range(options.steps), "learn"):
            batch.fill(self._train[torch.randperm(len(self._train), generator=self._generator)[: len(batch)]])
            paces.set(number, options.steps)
            step()
        return before, loss.mean(self._checked, options.batch)


def _step(
    groups: Sequence[Group], batch: _Batch, rates: Rates, paces: Paces, device: torch.device
) -> Callable[[], None]:
    """Return what does one training step of a filled batch; where all lies on one GPU, it is one CUDA graph."""

    def whole() -> None:
        with repeatable(device):
            step_groups(groups, batch.loss, rates, paces)

    gradients: list[torch.Tensor] = []

    def differentiate() -> None:
        with repeatable(device):
            gradients[:] = gradients_of(groups, batch.loss)[1]

    def spread() -> None:
        differentiated()
        move_groups(groups, gradients, rates, paces)

    if not any(group.is_elsewhere for group in groups):
        return Repeat(whole, device)
    differentiated = Repeat(differentiate, device)
    return spread


class LayerLoss:
    """The loss of a layer: squared errors of its output, each token's divided by the energy of its output."""

    def __init__(
        self, model: StreamedModel, index: int, module: torch.nn.Module, states: torch.Tensor, target: torch.Tensor
    ) -> None:
        self.run = lambda part: model.run(index, module, part)
        self.device, self.states, self.target = model.device, states, target
        parts = (part.to(model.device) for part in target.split(8))
        energy = torch.cat([part.float().square().mean(-1, keepdim=True) for part in parts])
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
            torch.empty(size, *tensor.shape[1:], dtype=tensor.dtype, device=of.device)
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
