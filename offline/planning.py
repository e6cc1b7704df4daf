"""Decides the rank of every matrix before the conversion: by policies, by a byte budget, or both."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from tqdm import tqdm

from .allocation import Curve, allocate, base_bits, measure_curves, rank_bits
from .conversion import Conversion
from .errors import ConversionError
from .metric import Moments
from .moments import LayerMoments, LoadedMatrix, MomentSource
from .ranks import Matrix, Statistics, assign_ranks, needs_counts, needs_kurtosis
from .reader import Layer, ModelReader
from .recipe import Recipe
from .sensitivity import sensitivity

BATCH_ELEMENTS = {"cpu": 2**18, "cuda": 2**28}
"""Most weights that the solver takes at once: on a CPU what its cache holds, on a GPU what fills it. The solver
needs about ten float32 copies of them."""
_SEARCH_STEPS = 24
_LARGEST_FACTOR = 64.0


class Batch(NamedTuple):
    """Matrices of one shape, their weights [B, N, K] and what errors in them cost."""

    matrices: list[Matrix]
    weights: torch.Tensor
    moments: Moments


def plan_ranks(
    reader: ModelReader, plan: Sequence[Layer], conversion: Conversion, device: torch.device, progress: bool
) -> tuple[dict[str, int], list[str]]:
    """Return the rank of every matrix, and warnings.

    Raises:
        ConversionError: a policy lacks its statistics, or the budget cannot be kept.
    """
    matrices = [source.matrix for layer in plan for source in layer.matrices]
    if conversion.budget_bits is not None and not conversion.policies:
        curves = _measure(reader, plan, conversion, device, progress)
        ranks = allocate(matrices, curves, conversion.budget_bits, conversion.recipe)
        return ranks, _warn_without_ranks(ranks, conversion.budget_bits, conversion.recipe.group_size)
    statistics = _statistics(reader, plan, conversion, device, progress)
    if conversion.budget_bits is None:
        return assign_ranks(conversion.policies, matrices, statistics)
    return _scale_policies(matrices, conversion, statistics, conversion.budget_bits)


def batches(
    loaded: Sequence[LoadedMatrix], moments: LayerMoments, ranks: Mapping[str, int], mixed: bool = True
) -> Iterator[Batch]:
    """Group a layer's matrices by shape, in order of rank, so that the solver works on many at once.

    Args:
        loaded: the layer's matrices with their weights.
        moments: of the layer.
        ranks: of every matrix, by name; those that it lacks count as one rank.
        mixed: whether a batch may hold several ranks above 0.
    """
    groups: dict[tuple[int, int, int, str], list[LoadedMatrix]] = defaultdict(list)
    for matrix, weights in loaded:
        rank = ranks.get(matrix.name, 0)
        groups[matrix.n, matrix.k, min(rank, 1) if mixed else rank, moments.group(matrix)].append((matrix, weights))
    for members in groups.values():
        members.sort(key=lambda member: ranks.get(member[0].name, 0))
        first, device = members[0][0], members[0][1].device
        footprint = first.n * first.k + moments.numbers(first)
        size = max(1, BATCH_ELEMENTS.get(device.type, 2**26) // footprint)
        for start in range(0, len(members), size):
            chunk = members[start : start + size]
            matrices = [matrix for matrix, _ in chunk]
            yield Batch(matrices, torch.stack([weights for _, weights in chunk]), moments.of(matrices, device))


def load_batches(
    reader: ModelReader,
    layer: Layer,
    source: MomentSource,
    ranks: Mapping[str, int],
    device: torch.device,
    mixed: bool = True,
) -> Iterator[Batch]:
    """Load a layer and yield the :func:`batches` of its matrices; its weights are gone after the last."""
    loaded = list(reader.load_layer(layer, device))
    if loaded:
        yield from batches(loaded, source.of_layer(reader, layer, loaded), ranks, mixed)


def excess_kurtosis(values: torch.Tensor) -> float:
    """Return E[(x - μ)⁴]/σ⁴ - 3 over all entries (the paper's section 2.1), 0 for a constant matrix."""
    centered = values.double() - values.double().mean()
    variance = centered.square().mean()
    return float(centered.pow(4).mean() / variance.square() - 3) if variance > 0 else 0.0


def progress_bar(plan: Sequence[Layer], what: str, progress: bool) -> Iterator[Layer]:
    """Iterate over layers with a progress bar on stderr."""
    return iter(tqdm(plan, desc=what, unit="layer", disable=not progress, file=sys.stderr))


def stored_bits(matrices: Sequence[Matrix], ranks: Mapping[str, int], group_size: int, factor_bits: int) -> float:
    """Return the average stored bits of a weight: codes, scales, zero points and factors."""
    weights = sum(matrix.n * matrix.k for matrix in matrices)
    factors = sum(ranks[matrix.name] * rank_bits(matrix, factor_bits) for matrix in matrices)
    return base_bits(group_size) + factors / weights


def layer_curves(
    layer: Iterable[Batch], recipe: Recipe, sensitivity_of: Callable[[Matrix], float] | None
) -> dict[str, Curve]:
    """Return the curve of expected cost of every matrix of a layer, by name.

    Args:
        layer: its matrices in batches.
        recipe: group size and seed.
        sensitivity_of: what relative errors of a matrix count; None where costs in these moments compare by themselves.
    """
    curves: dict[str, Curve] = {}
    for batch in layer:
        found = measure_curves(batch.weights, recipe, batch.moments, relative=sensitivity_of is not None)
        for matrix, curve in zip(batch.matrices, found, strict=True):
            weight = sensitivity_of(matrix) if sensitivity_of else 1.0
            curves[matrix.name] = Curve([cost * weight for cost in curve.costs])
    return curves


def _measure(
    reader: ModelReader, plan: Sequence[Layer], conversion: Conversion, device: torch.device, progress: bool
) -> dict[str, Curve]:
    """Return the curves of all matrices: one more pass over the weights."""
    weigh = (
        None if conversion.calibration.gradients else partial(sensitivity, family=reader.family, config=reader.config)
    )
    curves: dict[str, Curve] = {}
    for layer in progress_bar(plan, "measure", progress):
        loaded = load_batches(reader, layer, conversion.calibration, {}, device)
        curves |= layer_curves(loaded, conversion.recipe, weigh)
    return curves


def _warn_without_ranks(ranks: Mapping[str, int], budget: float, group_size: int) -> list[str]:
    if not ranks or any(ranks.values()):
        return []
    return [
        f"--budget-bits {budget:g} leaves nothing for compensators: codes, scales and zero points of group size "
        f"{group_size} take {base_bits(group_size):g} bits a weight; a little more gains much accuracy"
    ]


def _scale_policies(
    matrices: Sequence[Matrix], conversion: Conversion, statistics: Statistics, budget: float
) -> tuple[dict[str, int], list[str]]:
    """Return the ranks of the policies, all multiplied by the largest factor that keeps the budget."""
    recipe = conversion.recipe

    def ranks_at(factor: float) -> tuple[dict[str, int], list[str]]:
        policies = [policy._replace(rank=max(1, int(policy.rank * factor))) for policy in conversion.policies]
        return assign_ranks(policies, matrices, statistics)

    def fits(factor: float) -> bool:
        return stored_bits(matrices, ranks_at(factor)[0], recipe.group_size, recipe.factor_bits) <= budget

    low, high = 0.0, _LARGEST_FACTOR
    if not fits(low):
        least = stored_bits(matrices, ranks_at(low)[0], recipe.group_size, recipe.factor_bits)
        raise ConversionError(
            f"--budget-bits {budget:g}: these policies store {least:.3f} bits a weight at their least ranks; "
            f"raise the budget or drop a policy"
        )
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return ranks_at(low)


def _statistics(
    reader: ModelReader, plan: Sequence[Layer], conversion: Conversion, device: torch.device, progress: bool
) -> Statistics:
    kurtosis: dict[str, float] = {}
    if needs_kurtosis(conversion.policies):
        for layer in progress_bar(plan, "kurtosis", progress):
            for matrix, weights in reader.load_layer(layer, device):
                kurtosis[matrix.name] = excess_kurtosis(weights)
    if needs_counts(conversion.policies) and not conversion.expert_counts:
        raise ConversionError(
            "--ranks frequency=… needs --expert-counts FILE.json; make it with `milo stats MODEL --text FILE`"
        )
    return Statistics(kurtosis, conversion.expert_counts)
