"""Trains the quantized state of one decoder layer on what the layer puts out.

The layer runs on hidden states that the quantized layers before it made, and its output is compared with that of the
original model. Each token's squared error is divided by the energy of its own output, since a few tokens of huge norm
would drown the others. Everything stays in the format: only codes, scales, zero points and factors change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..nouns import Matrix
from ..solve.base.group import GroupQuantized
from ..solve.compensator.factors import FACTOR_ZERO, StoredFactor
from ..solve.compensator.low_rank import StoredPair
from ..solve.methods import Solved
from ..source.streamed_model import StreamedModel
from .latents import Latents, Rates, schedule

MIN_TOKENS = 128
"""A routed expert that saw fewer tokens of the calibration text keeps the solver's codes."""
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
    untrained: list[str]


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
    groups = _groups(model, index, module, solved, tokens, bits)
    check = torch.arange(len(states)) % CHECK_SHARE == CHECK_SHARE - 1
    if not check.any() or check.all():
        check = torch.ones(len(states), dtype=torch.bool)
    loss = _Loss(model, index, module, states, target)
    for group in groups:
        group.write()
    before = loss.mean(check.nonzero().flatten(), options.batch)
    train = (~check).nonzero().flatten() if not check.all() else torch.arange(len(states))
    generator = torch.Generator().manual_seed(options.seed + index)
    for step in range(options.steps):
        pick = train[torch.randperm(len(train), generator=generator)[: options.batch]]
        for group in groups:
            group.parameter.requires_grad_(True)
        loss(pick).backward()
        for group in groups:
            group.parameter.requires_grad_(False)
        share = schedule(step, options.steps)
        for group in groups:
            group.step(options.rates, share, step + 1)
        for group in groups:
            group.parameter.grad = None
    after = loss.mean(check.nonzero().flatten(), options.batch)
    untrained = [matrix.name for group in groups for matrix in group.untrained]
    if not after < before:
        return dict(solved), LearnReport(before, before, untrained)
    learned = {matrix: one for group in groups for matrix, one in group.stored().items()}
    return learned, LearnReport(before, after, untrained)


class _Loss:
    """The loss of a layer on some windows: squared errors, each token's divided by the energy of its output."""

    def __init__(
        self, model: StreamedModel, index: int, module: torch.nn.Module, states: torch.Tensor, target: torch.Tensor
    ) -> None:
        self._run = lambda pick: model.run(index, module, states[pick.to(states.device)])
        self._target = target
        energy = torch.cat([part.float().square().mean(-1, keepdim=True) for part in target.split(8)])
        self._weight = energy.clamp(min=1e-12).reciprocal()

    def __call__(self, pick: torch.Tensor) -> torch.Tensor:
        error = self._run(pick).float() - self._target[pick.to(self._target.device)].float()
        return (error.square() * self._weight[pick.to(self._weight.device)]).mean()

    @torch.no_grad()
    def mean(self, windows: torch.Tensor, batch: int) -> float:
        """Return the mean loss of windows."""
        return sum(float(self(part)) * len(part) for part in windows.split(batch)) / len(windows)


class _Group:
    """Matrices that lie in one parameter of the layer in one row range: a linear layer, or one role of all experts."""

    def __init__(self, parameter: torch.nn.Parameter, rows: slice, fused: bool, matrices: Sequence[Matrix]) -> None:
        self.parameter, self._rows, self._fused = parameter, rows, fused
        self.matrices = sorted(matrices, key=lambda matrix: matrix.expert or 0)
        self.untrained: list[Matrix] = []

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the matrices' part [B, N, K] of the parameter, or of a tensor like it."""
        return tensor[:, self._rows] if self._fused else tensor.unsqueeze(0)

    def begin(self, solved: Mapping[Matrix, Solved], tokens: Mapping[str, int], bits: int) -> None:
        """Take the solver's results."""
        states = [solved[matrix] for matrix in self.matrices]
        active = [tokens.get(matrix.name, MIN_TOKENS) >= MIN_TOKENS for matrix in self.matrices]
        self.untrained = [matrix for matrix, trained in zip(self.matrices, active, strict=True) if not trained]
        base = GroupQuantized(*(torch.stack(parts) for parts in zip(*(state.base for state in states), strict=True)))
        self._ranks = [state.rank for state in states]
        weights = self.view(self.parameter.data).float()
        trained = torch.tensor(active, device=weights.device)
        self._latents = Latents(weights, base, _stack_pairs(states), self._ranks, bits, trained)

    def write(self) -> None:
        """Write the quantized weights into the layer."""
        self._latents.write(self.view(self.parameter.data))

    def step(self, rates: Rates, share: float, step: int) -> None:
        """Take one step of Adam against the parameter's gradient."""
        if self.parameter.grad is not None:
            gradient, out = self.view(self.parameter.grad), self.view(self.parameter.data)
            self._latents.step(gradient, out, rates, share, step)

    def stored(self) -> dict[Matrix, Solved]:
        """Return the trained matrices."""
        base, pair = self._latents.stored()
        found = {}
        for place, (matrix, rank) in enumerate(zip(self.matrices, self._ranks, strict=True)):
            own = None if pair is None or rank == 0 else StoredPair(*(factor.rows(place, rank) for factor in pair))
            found[matrix] = Solved(GroupQuantized(*(part[place] for part in base)), own)
        return found


def _groups(
    model: StreamedModel,
    index: int,
    module: torch.nn.Module,
    solved: Mapping[Matrix, Solved],
    tokens: Mapping[str, int],
    bits: int,
) -> list[_Group]:
    names, own = model.parameters(index, module), dict(module.named_parameters())
    held = {name: own[mine].data for name, mine in names.items()}
    members: dict[tuple[str, int], list[Matrix]] = defaultdict(list)
    for matrix in solved:
        target, place = model.place(f"{matrix.name}.weight", held)
        first = 0 if place.dim() == held[target].dim() else (place.data_ptr() - held[target][matrix.expert].data_ptr())
        members[target, first // (place.element_size() * place.shape[-1])].append(matrix)
    groups = []
    for (target, first), matrices in members.items():
        fused = held[target].dim() == 3
        group = _Group(own[names[target]], slice(first, first + matrices[0].n), fused, matrices)
        group.begin(solved, tokens, bits)
        groups.append(group)
    return groups


def _stack_pairs(states: Sequence[Solved]) -> StoredPair | None:
    """Return the factors of all matrices, those of smaller ranks padded with rows that stand for 0."""
    most = max(state.rank for state in states)
    if most == 0:
        return None
    example = next(state.pair for state in states if state.pair is not None)
    factors = []
    for side in range(2):
        pairs = [None if state.pair is None else state.pair[side] for state in states]
        factors.append(_stack_factors(pairs, most, example[side]))
    return StoredPair(*factors)


def _stack_factors(factors: Sequence[StoredFactor | None], rank: int, like: StoredFactor) -> StoredFactor:
    zero = FACTOR_ZERO if like.values.dtype == torch.uint8 else 0
    values = like.values.new_full((len(factors), rank, like.values.shape[-1]), zero)
    scale = None if like.scale is None else like.scale.new_ones(len(factors), rank, like.scale.shape[-1])
    for place, factor in enumerate(factors):
        if factor is not None:
            values[place, : factor.values.shape[-2]] = factor.values
            if scale is not None and factor.scale is not None:
                scale[place, : factor.scale.shape[-2]] = factor.scale
    return StoredFactor(values, scale)
