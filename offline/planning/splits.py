"""Over how many GPUs vLLM can split a checkpoint's layers (``--tensor-parallel-size``).

The rule of a matrix is the plugin's own, :meth:`vllm_milo.checkpoint.CompensatorFormat.split_multiples`; which side of
a matrix is cut is vLLM's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm_milo.checkpoint import COMPENSATOR_GROUP_SIZE, GROUP_SIZES, MiLoFormat

from ..families.family import Family
from ..families.slots import Cut
from ..nouns import Kind, Matrix, Recipe
from ..ranks.budget import least_bits

USUAL = (2, 4, 8)
"""Tensor parallel sizes that users have."""
MOST_COST, SHARE_OF_RANKS = 0.1, 1 / 3
"""Stored bits of a weight that smaller groups may cost, and their share of what is left for ranks."""
LARGEST = 64
"""Ranks beyond which nobody splits one layer."""


def allowed_splits(
    matrices: Sequence[Matrix],
    kept: Sequence[Matrix],
    fmt: MiLoFormat,
    ranks: Mapping[str, int],
    config: Mapping[str, Any],
    family: Family,
) -> list[int]:
    """Return the tensor parallel sizes that the plugin and vLLM take, without expert parallelism; always with 1.

    Args:
        matrices: all that are quantized.
        kept: those that are not, which vLLM cuts anywhere.
        fmt: group sizes and factor bits.
        ranks: of these matrices, by name.
        config: the model's, for the heads of attention.
        family: of the model, which knows how each matrix is cut.
    """
    heads = int(config.get("num_attention_heads") or 1)
    shapes = {
        (
            family.cut(matrix.name),
            matrix.n,
            matrix.k,
            fmt.compensator.split_multiples(fmt.module_group_size(matrix.name), ranks[matrix.name] > 0),
        )
        for matrix in matrices
    }
    shapes |= {(family.cut(matrix.name), matrix.n, matrix.k, (1, 1)) for matrix in kept}
    key_heads = int(config.get("num_key_value_heads") or heads)
    return [
        size
        for size in range(1, min(heads, LARGEST) + 1)
        if size == 1
        or (
            _heads_split(heads, key_heads, size)
            and all(_splits(cut, n, k, multiples, size, key_heads) for cut, n, k, multiples in shapes)
        )
    ]


def narrow_groups(
    matrices: Sequence[Matrix], recipe: Recipe, budget_bits: float, family: Family
) -> tuple[tuple[int, int], ...]:
    """Return smaller groups for routed experts whose groups no tensor parallel size can cut; see :class:`Recipe`.

    An expert's down projection is cut along its inputs. Where a smaller group lets vLLM split them as users do, and
    costs few of the bits that are left for compensators, that is worth it: other checkpoints need expert parallelism.

    Args:
        matrices: those that are quantized.
        recipe: without such groups.
        budget_bits: stored bits of a weight.
        family: of the model.
    """
    cut = {m.k for m in matrices if m.kind is Kind.ROUTED_EXPERT and family.cut(m.name) is Cut.INPUTS}
    found: list[tuple[int, int]] = []
    for k in sorted(cut):
        size = recipe.group_size_for(k)
        fits = [one for one in GROUP_SIZES if COMPENSATOR_GROUP_SIZE <= one < size and _usual_splits(k, one)]
        if fits and not _usual_splits(k, size):
            best = max(fits, key=lambda one: (_usual_splits(k, one), one))
            narrower = replace(recipe, narrow=(*found, (k, best)))
            cost = least_bits(matrices, narrower) - least_bits(matrices, recipe)
            if cost <= min(MOST_COST, SHARE_OF_RANKS * (budget_bits - least_bits(matrices, recipe))):
                found.append((k, best))
    return tuple(found)


def _usual_splits(k: int, group_size: int) -> int:
    return sum(k % (size * group_size) == 0 for size in USUAL)


def _heads_split(heads: int, key_heads: int, size: int) -> bool:
    """Return whether each rank gets as many heads; those of keys and values may be repeated."""
    return heads % size == 0 and (key_heads % size == 0 or size % key_heads == 0)


def _splits(cut: Cut, n: int, k: int, multiples: tuple[int, int], size: int, key_heads: int) -> bool:
    """Return whether a matrix [n, k] can be cut over ``size`` ranks; parts must be multiples of ``multiples``."""
    of_n, of_k = multiples
    if cut is Cut.WHOLE:
        return True
    if cut is Cut.INPUTS:
        return k % (size * of_k) == 0 and n % of_n == 0
    parts = min(size, key_heads) if cut is Cut.KEYS else size
    return n % (parts * of_n) == 0 and k % of_k == 0
