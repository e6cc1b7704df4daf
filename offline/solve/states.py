"""What the joint loop keeps of each matrix of a batch, and how it takes the better of two."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base.group import GroupQuantized
from .compensator.factors import StoredFactor
from .compensator.low_rank import StoredPair


@dataclass
class State:
    """Base and compensator of a batch, with the cost of what they leave; the compensator is None at rank 0."""

    base: GroupQuantized
    pair: StoredPair | None
    cost: torch.Tensor


def choose_state(old: State, new: State, take: torch.Tensor) -> State:
    """Return ``new`` where ``take`` [B], else ``old``."""
    if old.pair is None or new.pair is None:
        raise ValueError("states to compare need compensators of one rank")
    pair = StoredPair(*(_choose_factor(a, b, take) for a, b in zip(old.pair, new.pair, strict=True)))
    return State(choose_base(old.base, new.base, take), pair, torch.where(take, new.cost, old.cost))


def choose_base(old: GroupQuantized, new: GroupQuantized, take: torch.Tensor) -> GroupQuantized:
    """Return ``new`` where ``take`` [B], else ``old``."""
    return GroupQuantized(*(_choose(a, b, take) for a, b in zip(old, new, strict=True)))


def select_state(state: State, index: torch.Tensor) -> State:
    """Return the state of the matrices ``index`` [b] of the batch."""
    pair = None
    if state.pair is not None:
        pair = StoredPair(
            *(StoredFactor(f.values[index], None if f.scale is None else f.scale[index]) for f in state.pair)
        )
    return State(select_base(state.base, index), pair, state.cost[index])


def select_base(base: GroupQuantized, index: torch.Tensor) -> GroupQuantized:
    """Return the result of the matrices ``index`` [b] of the batch."""
    return GroupQuantized(*(part[index] for part in base))


def put_better(into: State, part: State, index: torch.Tensor) -> None:
    """Write ``part``, states of the matrices ``index``, into a batch's states where they are cheaper."""
    if into.pair is None or part.pair is None:
        raise ValueError("states to compare need compensators of one rank")
    better = part.cost < into.cost[index]
    index = index[better]
    for old, new in zip((*into.base, into.cost), (*part.base, part.cost), strict=True):
        old[index] = new[better]
    for old_factor, new_factor in zip(into.pair, part.pair, strict=True):
        old_factor.values[index] = new_factor.values[better]
        if old_factor.scale is not None and new_factor.scale is not None:
            old_factor.scale[index] = new_factor.scale[better]


def _choose(old: torch.Tensor, new: torch.Tensor, take: torch.Tensor) -> torch.Tensor:
    return torch.where(take[:, None, None], new, old)


def _choose_factor(old: StoredFactor, new: StoredFactor, take: torch.Tensor) -> StoredFactor:
    values = _choose(old.values, new.values, take)
    if old.scale is None or new.scale is None:
        return StoredFactor(values, None)
    return StoredFactor(values, _choose(old.scale, new.scale, take))
