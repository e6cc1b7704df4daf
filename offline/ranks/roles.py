"""Ranks within a byte budget by what a matrix is part of: what every token passes gets most.

At equal bits, ranks for attention and shared experts close the most of HQQ's distance to the original. On the weights
of Qwen2.5-Coder-0.5B as a Qwen2-MoE, without data, dense ranks of 112 and routed ones of 8 leave a KL divergence of
0.207 and 0.150 nats (documentation, code), and the same bits spread evenly 0.328 and 0.226 (2026-11-27). A rank of a
routed expert serves only the tokens that it sees.

Steps are of 16, which the kernels hold: rank 8 is read and multiplied as rank 16 is. The first may be of 8, where a
budget pays for no more: 16 for some projections and none for others left a KL divergence of 0.0426 nats where 8 for all
left 0.0385 (``fast``, a Mixtral of 22 M parameters, 48 windows, 2026-11-29), and values alone, at 3.49 bits on the
model above, 0.104 where 8 for nearly all had left 0.070.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from vllm_milo.checkpoint import GROUP_SIZES
from vllm_milo.kernels.resident import BLOCK, rank_blocks
from vllm_milo.names import EXPERT_PROJECTIONS, leaf_of

from ..errors import ConversionError
from ..nouns import DENSE_KINDS, Kind, Matrix, Recipe
from ..served.target import Allowance, Target, allow
from .budget import least_bits, name_groups, rank_bits, stored_bits, unspent

ROUTED_SHARE = 1 / 14
"""Rank of a routed expert as a share of that of a matrix which every token passes."""
ROUTED_LIMIT = 0.5
"""No rank of a routed expert above this share of its smaller side: there the factors cost more than the weights."""
DENSE_LIMIT, LEAST_LIMIT = 1 / 8, 64
"""No other rank above this share of the larger side, or above 64 in small matrices: every token pays for it in serving.
"""
NARROW, NARROW_SHARE = 0.5, 2.0
"""Attention's matrices with at most half as many outputs as inputs, keys and values that many heads read, get twice the
rank, up to full rank. They are the smallest and do the most harm: on the model above, without data, raising them from
rank 112 to 128, which is full, closes 0.432 of HQQ's KL divergence in place of 0.394 (2026-11-27)."""
HALF = BLOCK // 2
_KEPT = (0.9, 0.8, 0.7, 0.6, 0.5)
_EXACT = 0.5
"""Of ranks that are searched for: so much less than the largest that fits."""


def share_budget(
    matrices: Sequence[Matrix], budget: float, recipe: Recipe, target: Target | None = None
) -> tuple[dict[str, int], list[str]]:
    """Return ranks by kind, as large as ``budget`` bits a weight and the target allow, and warnings.

    Args:
        matrices: all that are quantized.
        budget: average stored bits of a weight, everything counted.
        recipe: group sizes and bits of factors.
        target: what ranks may cost in serving; None for no limit.

    Raises:
        ConversionError: the budget does not even pay for the codes, scales and zero points.
    """
    least, groups = least_bits(matrices, recipe), name_groups(matrices, recipe)
    if budget < least:
        larger = " or --group-size" if recipe.group_size < max(GROUP_SIZES) else ""
        raise ConversionError(
            f"--budget-bits {budget:g}: codes, scales and zero points of {groups} take {least:g} bits "
            f"a weight already; raise the budget{larger}"
        )

    purse = _Purse(matrices, budget, recipe, allow(matrices, recipe, target))

    def ranks_at(dense: float) -> dict[str, int]:
        return {matrix.name: _rank(matrix, dense) for matrix in matrices}

    most = _largest(lambda dense: purse.pays_bits(ranks_at(dense)), max(max(m.n, m.k) for m in matrices) / ROUTED_SHARE)
    ranks = purse.spend_rest(ranks_at(most), _every_token_first(matrices), serving=False)
    if target is not None and not purse.pays_serving(ranks):
        ranks = _within_allowance(purse)
        return ranks, [_bounded(target, budget, stored_bits(matrices, ranks, recipe), any(ranks.values()))]
    warnings = []
    if any(ranks.values()) and all(ranks[matrix.name] == largest_rank(matrix) for matrix in matrices):
        warnings.append(unspent(budget, stored_bits(matrices, ranks, recipe)))
    if not any(ranks.values()):
        warnings.append(
            f"--budget-bits {budget:g} leaves nothing for compensators: codes, scales and zero points of {groups} "
            f"take {least:g} bits a weight; a little more gains much accuracy"
        )
    return ranks, warnings


def _bounded(target: Target, budget: float, spent: float, some: bool) -> str:
    """Return the warning that ranks are not what the budget alone would give."""
    if not some:
        return f"--serving-share {target.share:g} leaves nothing for compensators; 0.13 to 0.52 are usual"
    return f"--serving-share {target.share:g} bounds ranks: {spent:.3f} of {budget:g} bits a weight are stored"


def _largest(fits: Callable[[float], bool], high: float) -> float:
    """Return about the largest number up to ``high`` that fits; 0 where none does."""
    low = 0.0
    while high - low > _EXACT:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


Groups = Sequence[Sequence[Matrix]]
"""Matrices that get a step together."""


class _Purse(NamedTuple):
    """What ranks are paid from: stored bits, and what they may cost in serving."""

    matrices: Sequence[Matrix]
    budget: float
    recipe: Recipe
    allowance: Allowance

    def pays_bits(self, ranks: Mapping[str, int]) -> bool:
        return stored_bits(self.matrices, ranks, self.recipe) <= self.budget + 1e-9

    def pays_serving(self, ranks: Mapping[str, int]) -> bool:
        return self.allowance.spent(ranks) <= self.allowance.total

    def spend_rest(self, ranks: dict[str, int], order: Sequence[Groups], serving: bool) -> dict[str, int]:
        """Give what ranks leave in steps, to groups in order, until no step fits; return the ranks.

        Args:
            ranks: by name, which are raised.
            order: one list of groups after the other; each round of a list raises every group once.
            serving: whether steps must be within the allowance too.
        """
        weights = sum(matrix.n * matrix.k for matrix in self.matrices)
        bits = (self.budget - stored_bits(self.matrices, ranks, self.recipe)) * weights
        served = self.allowance.total - self.allowance.spent(ranks) if serving else math.inf
        for groups in order:
            growing = [(group, self._bits_of_rank(group), self.allowance.price(group)) for group in groups]
            while growing:
                grown = []
                for group, of_rank, of_block in growing:
                    rank = ranks[group[0].name]
                    more = _next_rank(rank) - rank
                    price, cost = more * of_rank, of_block * (rank_blocks(rank + more) - rank_blocks(rank))
                    if price <= bits and cost <= served and rank + more <= largest_rank(group[0]):
                        ranks.update((matrix.name, rank + more) for matrix in group)
                        bits, served = bits - price, served - cost
                        grown.append((group, of_rank, of_block))
                growing = grown
        return ranks

    def _bits_of_rank(self, group: Sequence[Matrix]) -> float:
        return sum(rank_bits(matrix, self.recipe.factor_bits) for matrix in group)


def _next_rank(rank: int) -> int:
    """Return the next larger rank that a matrix may have."""
    return rank + (HALF if rank < BLOCK else BLOCK)


def _within_allowance(purse: _Purse) -> dict[str, int]:
    """Return ranks where bits alone would cost too much in serving.

    What every token passes gives way to routed experts, of which a token reads few: it keeps the largest share, of a
    few, of the ranks that it could have alone with which the bits are spent, but a step where it could have one.
    """
    matrices, routed = purse.matrices, _routed_projections(purse.matrices)

    def alone(dense: float) -> dict[str, int]:
        return {m.name: 0 if m.kind is Kind.ROUTED_EXPERT else _rank(m, dense) for m in matrices}

    def fits(dense: float) -> bool:
        return purse.pays_bits(alone(dense)) and purse.pays_serving(alone(dense))

    def spent(ranks: dict[str, int]) -> float:
        return round(stored_bits(matrices, ranks, purse.recipe), 2)

    most = _largest(fits, max(max(matrix.n, matrix.k) for matrix in matrices))
    order = [routed, *_every_token_first(matrices)]
    kept = [most, *(share * most for share in _KEPT if share * most >= BLOCK)]
    return max((purse.spend_rest(alone(dense), order, serving=True) for dense in kept), key=spent)


def _every_token_first(matrices: Sequence[Matrix]) -> list[Groups]:
    """Return the order in which what a budget leaves is given: where every token passes, the cheapest matrices first.

    A step of all routed experts may cost more than all ranks of what every token passes. What these cannot take goes to
    one projection of a layer's experts after the other, the down projections first, which gain most.
    """
    dense = sorted((m for m in matrices if m.kind in DENSE_KINDS), key=lambda matrix: matrix.n + matrix.k)
    return [[[matrix] for matrix in dense], _routed_projections(matrices)]


def _routed_projections(matrices: Sequence[Matrix]) -> list[list[Matrix]]:
    """Return the projections of each layer's routed experts, those of all layers' down projections first."""
    found: dict[tuple[bool, str], list[Matrix]] = defaultdict(list)
    for matrix in matrices:
        if matrix.kind is Kind.ROUTED_EXPERT:
            leaf = leaf_of(matrix.name)
            found[EXPERT_PROJECTIONS.get(leaf) != "down", f"{matrix.experts}.{leaf}"].append(matrix)
    return [found[key] for key in sorted(found, key=lambda key: key[0])]


def largest_rank(matrix: Matrix) -> int:
    """Return the largest rank that a matrix may get, a multiple of 16."""
    if matrix.kind is Kind.ROUTED_EXPERT:
        most = int(min(matrix.n, matrix.k) * ROUTED_LIMIT)
    elif _is_narrow(matrix):
        most = matrix.max_rank
    else:
        most = min(matrix.max_rank, max(LEAST_LIMIT, int(max(matrix.n, matrix.k) * DENSE_LIMIT)))
    return most // BLOCK * BLOCK


def _rank(matrix: Matrix, dense: float) -> int:
    """Return the rank of a matrix, half of a step or steps of 16, where those that every token passes get ``dense``.

    That of a routed expert is rounded to the nearest of them: a step more or less is much for the few that it gets.
    """
    if matrix.kind is Kind.ROUTED_EXPERT:
        wanted, rounding = dense * ROUTED_SHARE, 0.5
    else:
        wanted, rounding = dense * (NARROW_SHARE if _is_narrow(matrix) else 1.0), 0.0
    step = HALF if wanted < BLOCK else BLOCK
    return min(int(wanted / step + rounding) * step, largest_rank(matrix))


def _is_narrow(matrix: Matrix) -> bool:
    return matrix.kind is Kind.ATTENTION and matrix.n <= matrix.k * NARROW
