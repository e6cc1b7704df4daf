"""Ranks within a byte budget by what a matrix is part of: what every token passes gets most.

At equal bits, ranks for attention and shared experts close the most of HQQ's distance to the original. On the weights
of Qwen2.5-Coder-0.5B as a Qwen2-MoE, without data, dense ranks of 112 and routed ones of 8 leave a KL divergence of
0.207 and 0.150 nats (documentation, code), and the same bits spread evenly 0.328 and 0.226 (2026-11-27). A rank of a
routed expert serves only the tokens that it sees.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from vllm_milo.names import EXPERT_PROJECTIONS, leaf_of

from ..errors import ConversionError
from ..nouns import DENSE_KINDS, RANK_MULTIPLE, Kind, Matrix, Recipe
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
_STEPS = 30


def share_budget(matrices: Sequence[Matrix], budget: float, recipe: Recipe) -> tuple[dict[str, int], list[str]]:
    """Return ranks by kind, as large as ``budget`` bits a weight allow, and warnings.

    Raises:
        ConversionError: the budget does not even pay for the codes, scales and zero points.
    """
    least, groups = least_bits(matrices, recipe), name_groups(matrices, recipe)
    if budget < least:
        raise ConversionError(
            f"--budget-bits {budget:g}: codes, scales and zero points of {groups} take {least:g} bits "
            f"a weight already; raise the budget or --group-size"
        )

    def ranks_at(dense: float) -> dict[str, int]:
        return {matrix.name: _rank(matrix, dense) for matrix in matrices}

    low, high = 0.0, float(max(max(matrix.n, matrix.k) for matrix in matrices)) / ROUTED_SHARE
    for _ in range(_STEPS):
        middle = (low + high) / 2
        fits = stored_bits(matrices, ranks_at(middle), recipe) <= budget + 1e-9
        low, high = (middle, high) if fits else (low, middle)
    ranks = ranks_at(low)
    _spend_rest(matrices, ranks, budget, recipe)
    warnings = []
    if any(ranks.values()) and all(ranks[matrix.name] == largest_rank(matrix) for matrix in matrices):
        warnings.append(unspent(budget, stored_bits(matrices, ranks, recipe)))
    if not any(ranks.values()):
        warnings.append(
            f"--budget-bits {budget:g} leaves nothing for compensators: codes, scales and zero points of {groups} "
            f"take {least:g} bits a weight; a little more gains much accuracy"
        )
    return ranks, warnings


def _spend_rest(matrices: Sequence[Matrix], ranks: dict[str, int], budget: float, recipe: Recipe) -> None:
    """Give what is left in steps where every token passes, the cheapest matrices first, until no step fits.

    A step of all routed experts may cost more than all ranks of what every token passes. What these cannot take goes to
    one projection of a layer's experts after the other, the down projections first, which gain most.
    """
    weights = sum(matrix.n * matrix.k for matrix in matrices)
    left = (budget - stored_bits(matrices, ranks, recipe)) * weights
    dense = sorted((m for m in matrices if m.kind in DENSE_KINDS), key=lambda matrix: matrix.n + matrix.k)
    for groups in ([[matrix] for matrix in dense], _routed_projections(matrices)):
        left = _grow(groups, ranks, left, recipe.factor_bits)


def _grow(groups: Sequence[Sequence[Matrix]], ranks: dict[str, int], left: float, factor_bits: int) -> float:
    """Give each group of matrices step after step while bits are ``left`` for one; return what is left then."""
    growing = list(groups)
    while growing:
        grown = []
        for group in growing:
            price = sum(rank_bits(matrix, factor_bits) for matrix in group) * RANK_MULTIPLE
            if price <= left and ranks[group[0].name] < largest_rank(group[0]):
                for matrix in group:
                    ranks[matrix.name] += RANK_MULTIPLE
                left -= price
                grown.append(group)
        growing = grown
    return left


def _routed_projections(matrices: Sequence[Matrix]) -> list[list[Matrix]]:
    """Return the projections of each layer's routed experts, those of all layers' down projections first."""
    found: dict[tuple[bool, str], list[Matrix]] = defaultdict(list)
    for matrix in matrices:
        if matrix.kind is Kind.ROUTED_EXPERT:
            leaf = leaf_of(matrix.name)
            found[EXPERT_PROJECTIONS.get(leaf) != "down", f"{matrix.experts}.{leaf}"].append(matrix)
    return [found[key] for key in sorted(found, key=lambda key: key[0])]


def largest_rank(matrix: Matrix) -> int:
    """Return the largest rank that a matrix may get, a multiple of 8."""
    if matrix.kind is Kind.ROUTED_EXPERT:
        most = int(min(matrix.n, matrix.k) * ROUTED_LIMIT)
    elif _is_narrow(matrix):
        most = matrix.max_rank
    else:
        most = min(matrix.max_rank, max(LEAST_LIMIT, int(max(matrix.n, matrix.k) * DENSE_LIMIT)))
    return most // RANK_MULTIPLE * RANK_MULTIPLE


def _rank(matrix: Matrix, dense: float) -> int:
    """Return the rank of a matrix, in steps of 8, where those that every token passes get ``dense``.

    That of a routed expert is rounded to the nearest step: a whole step more or less is much for the few that it gets.
    """
    if matrix.kind is Kind.ROUTED_EXPERT:
        wanted = int(dense * ROUTED_SHARE / RANK_MULTIPLE + 0.5) * RANK_MULTIPLE
    else:
        share = NARROW_SHARE if _is_narrow(matrix) else 1.0
        wanted = int(dense * share // RANK_MULTIPLE) * RANK_MULTIPLE
    return min(wanted, largest_rank(matrix))


def _is_narrow(matrix: Matrix) -> bool:
    return matrix.kind is Kind.ATTENTION and matrix.n <= matrix.k * NARROW
