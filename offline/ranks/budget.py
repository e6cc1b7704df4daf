"""What ranks cost in stored bits, and how policies are scaled to a byte budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm_milo.checkpoint import BITS, COMPENSATOR_GROUP_SIZE

from ..errors import ConversionError
from ..nouns import Matrix, Recipe
from .policies import Policy, Statistics, assign_ranks

SCALE_BITS = 16


def base_bits(group_size: int) -> float:
    """Return the stored bits of a weight without compensators: code, scale and zero point."""
    return BITS + 2 * SCALE_BITS / group_size


def rank_bits(matrix: Matrix, factor_bits: int) -> float:
    """Return the stored bits of one rank of a matrix: a row of U and one of V, with their scales."""
    scale = SCALE_BITS / COMPENSATOR_GROUP_SIZE if factor_bits < 16 else 0
    return (matrix.n + matrix.k) * (factor_bits + scale)


_SEARCH_STEPS = 24
_LARGEST_FACTOR = 64.0


def least_bits(matrices: Sequence[Matrix], recipe: Recipe) -> float:
    """Return the average stored bits of a weight without compensators, each matrix in the groups that it gets."""
    weights = sum(matrix.n * matrix.k for matrix in matrices)
    return sum(matrix.n * matrix.k * base_bits(recipe.group_size_for(matrix.k)) for matrix in matrices) / weights


def name_groups(matrices: Sequence[Matrix], recipe: Recipe) -> str:
    """Return ``group size 128``, or ``group sizes 128 and 64`` where matrices differ, for messages."""
    sizes = sorted({recipe.group_size_for(matrix.k) for matrix in matrices}, reverse=True)
    return f"group size{'s' if len(sizes) > 1 else ''} {' and '.join(map(str, sizes))}"


def stored_bits(matrices: Sequence[Matrix], ranks: Mapping[str, int], recipe: Recipe) -> float:
    """Return the average stored bits of a weight: codes, scales, zero points and factors."""
    weights = sum(matrix.n * matrix.k for matrix in matrices)
    factors = sum(ranks[matrix.name] * rank_bits(matrix, recipe.factor_bits) for matrix in matrices)
    return least_bits(matrices, recipe) + factors / weights


def unspent(budget: float, spent: float) -> str:
    """Return the warning that all ranks are as large as they get, and the budget is not spent."""
    return f"--budget-bits {budget:g}: {spent:.3f} bits a weight are stored, all ranks are as large as they may be"


def scale_policies(
    matrices: Sequence[Matrix], policies: Sequence[Policy], statistics: Statistics, recipe: Recipe, budget: float
) -> tuple[dict[str, int], list[str]]:
    """Return the ranks of the policies, all multiplied by the largest factor that keeps the budget, and warnings.

    Raises:
        ConversionError: the policies' least ranks take more than ``budget`` bits a weight.
    """

    def ranks_at(factor: float) -> tuple[dict[str, int], list[str]]:
        scaled = [policy._replace(rank=max(1, int(policy.rank * factor))) for policy in policies]
        return assign_ranks(scaled, matrices, statistics)

    def fits(factor: float) -> bool:
        return stored_bits(matrices, ranks_at(factor)[0], recipe) <= budget

    low, high = 0.0, _LARGEST_FACTOR
    if not fits(low):
        least = stored_bits(matrices, ranks_at(low)[0], recipe)
        raise ConversionError(
            f"--budget-bits {budget:g}: these policies store {least:.3f} bits a weight at their least ranks; "
            f"raise the budget or drop a policy"
        )
    if fits(_LARGEST_FACTOR):
        ranks, warnings = ranks_at(_LARGEST_FACTOR)
        return ranks, [*warnings, unspent(budget, stored_bits(matrices, ranks, recipe))]
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return ranks_at(low)
