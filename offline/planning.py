"""Decides the rank of every matrix before the conversion: by policies, by a byte budget, or both."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from tqdm import tqdm

from .allocation import Curve, allocate, base_bits, measure_curves, rank_bits
from .calibration import Calibration
from .conversion import Conversion
from .errors import ConversionError
from .metric import Metric, Moments
from .ranks import Matrix, Statistics, assign_ranks, needs_counts, needs_kurtosis
from .reader import Layer, ModelReader
from .sensitivity import sensitivity

BATCH_ELEMENTS = {"cpu": 2**18, "cuda": 2**28}
"""Most weights that the solver takes at once: on a CPU what its cache holds, on a GPU what fills it. The solver
needs about ten float32 copies of them."""
_SEARCH_STEPS = 24
_LARGEST_FACTOR = 64.0


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
        return allocate(matrices, curves, conversion.budget_bits, conversion.recipe), []
    statistics = _statistics(reader, plan, conversion, device, progress)
    if conversion.budget_bits is None:
        return assign_ranks(conversion.policies, matrices, statistics)
    return _scale_policies(matrices, conversion, statistics, conversion.budget_bits)


def batches(
    matrices: Iterator[tuple[Matrix, torch.Tensor]], ranks: Mapping[str, int], moments: bool, mixed: bool = True
) -> Iterator[tuple[list[Matrix], torch.Tensor]]:
    """Group a layer's matrices by shape, in order of rank, so that the solver works on many at once.

    Args:
        matrices: the layer's, with their weights.
        ranks: of every matrix, by name; those that it lacks count as one rank.
        moments: whether second moments [K, K] and [N, N] take memory beside the weights.
        mixed: whether a batch may hold several ranks above 0.
    """
    groups: dict[tuple[int, int, int], list[tuple[Matrix, torch.Tensor]]] = defaultdict(list)
    for matrix, weights in matrices:
        rank = ranks.get(matrix.name, 0)
        groups[matrix.n, matrix.k, min(rank, 1) if mixed else rank].append((matrix, weights))
    for (n, k, _), members in groups.items():
        members.sort(key=lambda member: ranks.get(member[0].name, 0))
        footprint = n * k + (n * n + k * k if moments else 0)
        size = max(1, BATCH_ELEMENTS.get(members[0][1].device.type, 2**26) // footprint)
        for start in range(0, len(members), size):
            chunk = members[start : start + size]
            yield [matrix for matrix, _ in chunk], torch.stack([weights for _, weights in chunk])


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


def _measure(
    reader: ModelReader, plan: Sequence[Layer], conversion: Conversion, device: torch.device, progress: bool
) -> dict[str, Curve]:
    """Return the curve of expected cost of every matrix: one more pass over the weights."""
    curves: dict[str, Curve] = {}
    calibration = conversion.calibration
    for layer in progress_bar(plan, "measure", progress):
        for batch, weights in batches(reader.load_layer(layer, device), {}, calibration is not None):
            moments = calibration.moments(batch, device) if calibration else None
            found = measure_curves(weights, conversion.recipe, moments)
            sizes = _sizes(weights, calibration, moments)
            for matrix, curve, size in zip(batch, found, sizes, strict=True):
                known = calibration is not None and calibration.gradients
                weight = 1.0 if known else sensitivity(matrix, reader.family, reader.config) / size
                curves[matrix.name] = Curve([cost * weight for cost in curve.costs])
    return curves


def _sizes(weights: torch.Tensor, calibration: Calibration | None, moments: Moments | None) -> list[float]:
    """Return what makes costs relative: with moments of inputs alone the outputs' power, which costs are shares of."""
    if calibration is None or calibration.gradients or moments is None:
        return [1.0] * len(weights)
    return Metric.of(moments).cost(weights).clamp(min=1e-30).tolist()


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
