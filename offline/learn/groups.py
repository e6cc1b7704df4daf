"""Which of a model's parameters hold which quantized matrices, and their training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch

from ..nouns import Matrix
from ..solve.base.group import GroupQuantized
from ..solve.compensator.factors import FACTOR_ZERO, StoredFactor
from ..solve.compensator.low_rank import StoredPair
from ..solve.methods import Solved
from .latents import Latents, Pace, Rates

MIN_TOKENS = 128
"""A routed expert that saw fewer tokens of the calibration text keeps the solver's codes."""

Place = Callable[[str, Mapping[str, torch.Tensor]], tuple[str, torch.Tensor]]
"""Which parameter a tensor of the source belongs to, and its place in it; see :meth:`..source.streamed_model`."""


class Group:
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
        trained = torch.tensor(active, device=weights.device) & weights.flatten(1).any(1)  # dead ones stay exactly 0
        self._latents = Latents(weights, base, _stack_pairs(states), self._ranks, bits, trained)

    def write(self) -> None:
        """Write the quantized weights into the layer."""
        self._latents.write(self.view(self.parameter.data))

    def step(self, gradient: torch.Tensor, rates: Rates, pace: Pace) -> None:
        """Take one step of Adam against a gradient of the parameter's shape."""
        self._latents.step(self.view(gradient), self.view(self.parameter.data), rates, pace)

    def stored(self) -> dict[Matrix, Solved]:
        """Return the trained matrices."""
        base, pair = self._latents.stored()
        found = {}
        for place, (matrix, rank) in enumerate(zip(self.matrices, self._ranks, strict=True)):
            own = None if pair is None or rank == 0 else StoredPair(*(factor.rows(place, rank) for factor in pair))
            found[matrix] = Solved(GroupQuantized(*(part[place] for part in base)), own)
        return found


def make_groups(
    place: Place,
    parameters: Mapping[str, torch.nn.Parameter],
    solved: Mapping[Matrix, Solved],
    tokens: Mapping[str, int],
    bits: int,
) -> list[Group]:
    """Return the groups of some matrices.

    Args:
        place: of a tensor in ``parameters``.
        parameters: of the layer or layers that hold the matrices, by their names in checkpoints.
        solved: what the solver made of each matrix.
        tokens: of the calibration text that each routed expert saw, by the name of its matrices.
        bits: of the factors.
    """
    held = {name: parameter.data for name, parameter in parameters.items()}
    members: dict[tuple[str, int], list[Matrix]] = defaultdict(list)
    for matrix in solved:
        target, view = place(f"{matrix.name}.weight", held)
        whole = held[target] if held[target].dim() == 2 else held[target][matrix.expert]
        first = (view.data_ptr() - whole.data_ptr()) // (view.element_size() * view.shape[-1])
        members[target, first].append(matrix)
    groups = []
    for (target, first), matrices in members.items():
        fused = held[target].dim() == 3
        group = Group(parameters[target], slice(first, first + matrices[0].n), fused, matrices)
        group.begin(solved, tokens, bits)
        groups.append(group)
    return groups


def step_groups(groups: Sequence[Group], loss: Callable[[], torch.Tensor], rates: Rates, pace: Pace) -> torch.Tensor:
    """Take one step of Adam with all groups against the gradient of a loss; return the loss."""
    parameters = list({id(group.parameter): group.parameter for group in groups}.values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    value = loss()
    gradients = torch.autograd.grad(value, parameters)
    for parameter in parameters:
        parameter.requires_grad_(False)
    by_parameter = {id(parameter): gradient for parameter, gradient in zip(parameters, gradients, strict=True)}
    with torch.no_grad():
        for group in groups:
            group.step(by_parameter[id(group.parameter)], rates, pace)
    return value.detach()


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
