"""Which of a model's parameters hold which quantized matrices, and their training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch

from ..nouns import EXPERT_PIECES, Matrix
from ..solve.base.group import GroupQuantized
from ..solve.compensator.factors import FACTOR_ZERO, StoredFactor
from ..solve.compensator.low_rank import StoredPair
from ..solve.methods import Solved
from .latents import Latents, Pace, Rates

MIN_TOKENS = 128
"""A routed expert that saw fewer tokens of the calibration text keeps the solver's codes."""

PIECE_WEIGHTS = 2**24
"""Of a piece of one role's experts, at least. Shapes alone decide on pieces, not devices: on GPUs cuBLAS chooses by the
size of a batch how it adds up."""

Place = Callable[[str, Mapping[str, torch.Tensor]], tuple[str, torch.Tensor]]
"""Which parameter a tensor of the source belongs to, and its place in it; see :meth:`..source.streamed_model`."""


class Group:
    """Matrices that lie side by side in one parameter of the layer: a linear layer, or one role of some experts.

    Args:
        parameter: that holds them.
        rows: of the parameter, or of each expert in it.
        matrices: in the order of the experts.
        device: where the trained state lies; where that is not the parameter's, gradients go there and weights back.
    """

    def __init__(
        self, parameter: torch.nn.Parameter, rows: slice, matrices: Sequence[Matrix], device: torch.device
    ) -> None:
        self.parameter, self.matrices, self.device = parameter, matrices, device
        first = matrices[0].expert or 0
        self._part = (slice(first, first + len(matrices)), rows) if parameter.dim() == 3 else (None, slice(None))
        self._elsewhere: torch.Tensor | None = None
        self.untrained: list[Matrix] = []

    @property
    def is_elsewhere(self) -> bool:
        """Return whether the trained state lies on another device than the layer."""
        return self.device != self.parameter.device

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the matrices' part [B, N, K] of the parameter, or of a tensor like it."""
        return tensor[self._part]

    def begin(self, solved: Mapping[Matrix, Solved], tokens: Mapping[str, int], bits: int) -> None:
        """Take the solver's results."""
        states = [solved[matrix].to(self.device) for matrix in self.matrices]
        active = [tokens.get(matrix.name, MIN_TOKENS) >= MIN_TOKENS for matrix in self.matrices]
        self.untrained = [matrix for matrix, trained in zip(self.matrices, active, strict=True) if not trained]
        base = GroupQuantized(*(torch.stack(parts) for parts in zip(*(state.base for state in states), strict=True)))
        self._ranks = [state.rank for state in states]
        weights = self.view(self.parameter.data).to(self.device).float()
        trained = torch.tensor(active, device=weights.device) & weights.flatten(1).any(1)  # dead ones stay exactly 0
        self._latents = Latents(weights, base, _stack_pairs(states), self._ranks, bits, trained)
        if self.is_elsewhere:
            self._elsewhere = torch.empty_like(weights, dtype=self.parameter.dtype)

    def write(self) -> None:
        """Write the quantized weights into the layer."""
        place = self.view(self.parameter.data)
        self._latents.write(place if self._elsewhere is None else self._elsewhere)
        self._bring(place)

    def step(self, gradient: torch.Tensor, rates: Rates, pace: Pace) -> None:
        """Take one step of Adam.

        Args:
            gradient: of the parameter's shape, on its device.
            rates: learning rates.
            pace: of this step, on the device of the trained state.
        """
        place = self.view(self.parameter.data)
        out = place if self._elsewhere is None else self._elsewhere
        self._latents.step(self.view(gradient).to(self.device), out, rates, pace)
        self._bring(place)

    def _bring(self, place: torch.Tensor) -> None:
        if self._elsewhere is not None:
            place.copy_(self._elsewhere)

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
    devices: Sequence[torch.device] = (),
) -> list[Group]:
    """Return the groups of some matrices.

    Args:
        place: of a tensor in ``parameters``.
        parameters: of the layer or layers that hold the matrices, by their names in checkpoints.
        solved: what the solver made of each matrix.
        tokens: of the calibration text that each routed expert saw, by the name of its matrices.
        bits: of the factors.
        devices: where the trained state of experts lies, a part on each; by default, and for other matrices, where
            the parameters are.
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
        pieces = _pieces(matrices) if held[target].dim() == 3 else [matrices]
        for number, piece in enumerate(pieces):
            device = devices[number * len(devices) // len(pieces)] if devices else held[target].device
            group = Group(parameters[target], slice(first, first + matrices[0].n), piece, device)
            group.begin(solved, tokens, bits)
            groups.append(group)
    return groups


def _pieces(matrices: Sequence[Matrix]) -> list[list[Matrix]]:
    """Return one role of a layer's experts in pieces of the same number of neighbours, but for the last."""
    ordered = sorted(matrices, key=lambda matrix: matrix.expert or 0)
    size = max(-(-len(ordered) // EXPERT_PIECES), -(-PIECE_WEIGHTS // (ordered[0].n * ordered[0].k)))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


class Paces:
    """What differs between the steps of a training, on each device that holds a part of the trained state."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._of = {device: Pace(device) for device in {group.device: None for group in groups}}

    def set(self, step: int, steps: int) -> None:
        """Prepare for a step, from 0."""
        for pace in self._of.values():
            pace.set(step, steps)

    def of(self, group: Group) -> Pace:
        """Return what a group reads."""
        return self._of[group.device]


def step_groups(groups: Sequence[Group], loss: Callable[[], torch.Tensor], rates: Rates, paces: Paces) -> torch.Tensor:
    """Take one step of Adam with all groups against the gradient of a loss; return the loss."""
    value, gradients = gradients_of(groups, loss)
    move_groups(groups, gradients, rates, paces)
    return value


def gradients_of(groups: Sequence[Group], loss: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return a loss, and its gradient at each group's parameter, the same tensor for groups of one parameter."""
    parameters = list({id(group.parameter): group.parameter for group in groups}.values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    value = loss()
    gradients = torch.autograd.grad(value, parameters)
    for parameter in parameters:
        parameter.requires_grad_(False)
    by_parameter = {id(parameter): gradient for parameter, gradient in zip(parameters, gradients, strict=True)}
    return value.detach(), [by_parameter[id(group.parameter)] for group in groups]


@torch.no_grad()
def move_groups(groups: Sequence[Group], gradients: Sequence[torch.Tensor], rates: Rates, paces: Paces) -> None:
    """Take one step of Adam with all groups, each against the gradient of its parameter."""
    for group, gradient in zip(groups, gradients, strict=True):
        group.step(gradient, rates, paces.of(group))


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
