"""Ranks within a layer by measured need: each step of 16 goes where it takes most from the error of the layer's output.

A step is what the kernels hold: rank 8 would be read and multiplied as rank 16 is. Against steps of 8 that costs
nothing: 0.0221 for 0.0219 and 0.0308 for 0.0309 nats, at 3.596, 3.599 and twice 3.600 bits, on the models below by the
default preset on a CPU (2026-11-28; ``milo eval``, 64 windows). Routed experts get none there.

A role is what gets one rank: a linear layer, or one projection of all routed experts. Of each one it is known what
quantizing it alone does to the output of the layer, and what share of that is left at a few ranks.

At equal bits this leaves less KL divergence than ranks by kind (:mod:`.roles`), in nats on two trained models of 25 M
parameters with little training on a CPU: 0.0238 for 0.0256, and 0.0305 for 0.0315 (2026-11-27).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vllm_milo.kernels.resident import BLOCK

from ..nouns import Matrix
from ..served.target import Allowance
from .budget import rank_bits
from .roles import largest_rank

PROBES = 3
"""Ranks at which a role is tried, at most."""
REACH, LEAST_REACH = 4, 32
"""The largest of them is so many times the rank by kind, and at least the second, where its limit allows."""

WEIGHTS = tuple(step / 8 for step in range(9))
"""How much a step's cost in serving counts beside its stored bits, where it does: each is tried."""

Roles = Mapping[str, Sequence[Matrix]]
"""The matrices of each role of a layer, all of one shape."""


class Need(NamedTuple):
    """What is measured of a role.

    Attributes:
        damage: error of the layer's output where this role alone is quantized without a compensator.
        left: share of it that is left, by rank, at one or more ranks above 0.
    """

    damage: float
    left: Mapping[int, float]


def group_roles(matrices: Sequence[Matrix]) -> dict[str, list[Matrix]]:
    """Return the matrices of one layer by role; the name of a role is a matrix's, for experts without the number."""
    roles: dict[str, list[Matrix]] = defaultdict(list)
    for matrix in matrices:
        leaf = matrix.name.rpartition(".")[2]
        roles[matrix.name if matrix.experts is None else f"{matrix.experts}.{leaf}"].append(matrix)
    return dict(roles)


def probe_ranks(matrix: Matrix, planned: int) -> list[int]:
    """Return the ranks at which to try a role whose matrices get ``planned`` by kind; none where it may get no rank.

    From the first step up to where measuring may lift it, evenly spaced in the logarithm: the first ranks take most.
    """
    most = min(largest_rank(matrix), max(REACH * planned, LEAST_REACH))
    steps = most // BLOCK
    if not steps:
        return []
    return sorted({BLOCK * round(steps ** (place / (PROBES - 1))) for place in range(PROBES)})


def share_left(left: Mapping[int, float], rank: int) -> float:
    """Return the share of the error that is left at a rank, between and beyond those that were tried.

    Its logarithm is a line between two of them. No line falls more steeply than the one before it, since ranks come in
    order of what they take; beyond the last, its line goes on.
    """
    at, value, slope = 0, 0.0, math.inf
    for known in sorted(left):
        found = math.log(max(left[known], 1e-9))
        slope = min(slope, max(0.0, (value - found) / (known - at)))
        if rank <= known:
            break
        at, value = known, value - slope * (known - at)
    return math.exp(value - slope * (rank - at)) if rank else 1.0


def share_by_need(
    roles: Roles, needs: Mapping[str, Need], bits: float, factor_bits: int, allowance: Allowance | None = None
) -> dict[str, int]:
    """Return the rank of each role of a layer.

    Steps go where they take most from the error for their price. Where bits alone would have ranks cost more in serving
    than they may, a step's price is a mixture of both, and the mixture counts that leaves the least error.

    Args:
        roles: the layer's matrices.
        needs: of each role; one without is given no rank.
        bits: that the factors of all matrices may take together; no more are used.
        factor_bits: storage of a factor's entries.
        allowance: what they may cost in serving; None for no limit.
    """
    prices = {role: BLOCK * sum(rank_bits(matrix, factor_bits) for matrix in of) for role, of in roles.items()}
    free = _buy(roles, needs, [_Purse(prices, bits)], [1.0])
    if allowance is None:
        return free
    served = _Purse({role: allowance.price(of) for role, of in roles.items()}, allowance.total)
    if served.holds(free):
        return free
    purses = [_Purse(prices, bits), served]
    tried = [_buy(roles, needs, purses, [1 - weight, weight]) for weight in WEIGHTS]
    return min(tried, key=lambda ranks: _damage(needs, ranks))


class _Purse(NamedTuple):
    """What a step of each role costs, and what all steps together may."""

    prices: Mapping[str, float]
    total: float

    def holds(self, ranks: Mapping[str, int]) -> bool:
        return sum(rank // BLOCK * self.prices[role] for role, rank in ranks.items()) <= self.total


def _buy(roles: Roles, needs: Mapping[str, Need], purses: Sequence[_Purse], weights: Sequence[float]) -> dict[str, int]:
    """Return the ranks that purses pay for, step after step where most is gained for the weighed price of all."""
    ranks, left = dict.fromkeys(roles, 0), [purse.total for purse in purses]
    limits = {role: largest_rank(roles[role][0]) for role in needs}

    def price(role: str) -> float:
        shares = (
            weight * purse.prices[role] / purse.total for weight, purse in zip(weights, purses, strict=True) if weight
        )
        return max(sum(shares), 1e-30)

    def gain(role: str) -> float:
        found, rank = needs[role].left, ranks[role]
        return needs[role].damage * (share_left(found, rank) - share_left(found, rank + BLOCK)) / price(role)

    def affordable(role: str) -> bool:
        return all(purse.prices[role] <= rest for purse, rest in zip(purses, left, strict=True))

    while open_ := [role for role in needs if ranks[role] + BLOCK <= limits[role] and affordable(role)]:
        best = max(open_, key=gain)
        ranks[best] += BLOCK
        left = [rest - purse.prices[best] for purse, rest in zip(purses, left, strict=True)]
    return ranks


def _damage(needs: Mapping[str, Need], ranks: Mapping[str, int]) -> float:
    """Return the error that is left, as far as errors of roles add up."""
    return sum(need.damage * share_left(need.left, ranks[role]) for role, need in needs.items())
