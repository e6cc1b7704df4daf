"""What ranks may cost when they are served: a preset's target, as an allowance that steps of rank are paid from.

The target is a share: what reading factors costs a decoded token over what reading codes costs it, both by the measured
costs of a byte (:mod:`.costs`). Launches are not in it: a layer has them with any rank, however small.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from vllm_milo.kernels.resident import BLOCK, rank_blocks

from ..nouns import Matrix, Recipe
from ..source.config import chosen_experts
from .costs import Costs, shipped_costs
from .load import Held, costs_of, read_shares


class Target(NamedTuple):
    """The most that compensators may cost in serving.

    Attributes:
        share: of what codes cost, such as 0.3.
        top_k: experts of a token.
    """

    share: float
    top_k: int


class Allowance(NamedTuple):
    """What the ranks of some matrices may cost together, in bytes-equivalents of one decoded token.

    Attributes:
        prices: of a block of 16 ranks of each matrix, by name.
        total: of all of them.
    """

    prices: Mapping[str, float]
    total: float

    def spent(self, ranks: Mapping[str, int]) -> float:
        """Return what ranks cost, by name; a block that is begun is paid as a whole."""
        return sum(self.prices[name] * rank_blocks(rank) for name, rank in ranks.items())

    def price(self, matrices: Iterable[Matrix]) -> float:
        """Return what a block of 16 ranks of each of some matrices costs."""
        return sum(self.prices[matrix.name] for matrix in matrices)


def find_target(share: float | None, settings: Mapping[str, Any]) -> Target | None:
    """Return the target of a model; None for no share, and where the model does not say how many experts a token reads.

    Args:
        share: see :class:`Target`.
        settings: of the text model.
    """
    top_k = chosen_experts(settings)
    return None if share is None or top_k is None else Target(share, top_k)


def allow(matrices: Sequence[Matrix], recipe: Recipe, target: Target | None, costs: Costs | None = None) -> Allowance:
    """Return what the ranks of some matrices may cost; without a target, whatever they do.

    Args:
        matrices: of one or more layers, with all quantized experts of each.
        recipe: group sizes and bits of factors.
        target: of the model.
        costs: of bytes; those of the shipped table without.
    """
    if target is None:
        return Allowance(dict.fromkeys((matrix.name for matrix in matrices), 0.0), math.inf)
    costs = shipped_costs() if costs is None else costs
    shares = read_shares(matrices, target.top_k)
    prices, codes = {}, 0.0
    for matrix in matrices:
        block = Held(matrix, BLOCK, recipe.group_size_for(matrix.k), recipe.factor_bits)
        of, share = costs_of(matrix, costs), shares[matrix.name]
        prices[matrix.name] = share * of.factor_byte * block.factor_bytes
        codes += share * of.code_byte * block.code_bytes
    return Allowance(prices, target.share * codes)
