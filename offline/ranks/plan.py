"""Decides the rank of every matrix before the conversion: by policies, by a byte budget, or both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from ..batches import Batch, load_batches
from ..calibration.moment_source import MomentSource
from ..errors import ConversionError
from ..nouns import Matrix, Recipe
from ..progress import progress_bar
from ..source.layers import Layer
from ..source.reader import ModelReader
from .allocation import Curve, allocate, measure_curves
from .budget import base_bits, scale_policies
from .policies import Policy, Statistics, assign_ranks, needs_counts, needs_kurtosis
from .sensitivity import sensitivity


@dataclass(frozen=True)
class RankChoice:
    """What decides the ranks of a model.

    Attributes:
        policies: rank policies, added up; with a budget they are scaled to fit it.
        budget_bits: average stored bits of a quantized weight, everything counted; without policies the ranks come
            from measured spectra (:mod:`.allocation`).
        expert_counts: uses of each expert, by experts' name; for the frequency policy.
    """

    policies: Sequence[Policy]
    budget_bits: float | None
    expert_counts: Mapping[str, Sequence[int]]


class Pass(NamedTuple):
    """One more pass over the weights of a model: its layers without what is ignored, and where they are worked on."""

    reader: ModelReader
    layers: Sequence[Layer]
    device: torch.device
    progress: bool


def plan_ranks(
    model: Pass, choice: RankChoice, recipe: Recipe, source: MomentSource
) -> tuple[dict[str, int], list[str]]:
    """Return the rank of every matrix, and warnings.

    Args:
        model: the layers whose matrices get ranks.
        choice: policies, budget, statistics.
        recipe: group size, factor bits and seed.
        source: what errors cost, for ranks by measured spectra.

    Raises:
        ConversionError: a policy lacks its statistics, or the budget cannot be kept.
    """
    matrices = [held.matrix for layer in model.layers for held in layer.matrices]
    if choice.budget_bits is not None and not choice.policies:
        ranks = allocate(matrices, _measure(model, recipe, source), choice.budget_bits, recipe)
        return ranks, _warn_without_ranks(ranks, choice.budget_bits, recipe.group_size)
    statistics = _statistics(model, choice)
    if choice.budget_bits is None:
        return assign_ranks(choice.policies, matrices, statistics)
    return scale_policies(matrices, choice.policies, statistics, recipe, choice.budget_bits)


def excess_kurtosis(values: torch.Tensor) -> float:
    """Return E[(x - μ)⁴]/σ⁴ - 3 over all entries (the paper's section 2.1), 0 for a constant matrix."""
    centered = values.double() - values.double().mean()
    variance = centered.square().mean()
    return float(centered.pow(4).mean() / variance.square() - 3) if variance > 0 else 0.0


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


def _measure(model: Pass, recipe: Recipe, source: MomentSource) -> dict[str, Curve]:
    """Return the curves of all matrices: one more pass over the weights."""
    reader = model.reader
    weigh = None if source.gradients else partial(sensitivity, family=reader.family, config=reader.config)
    curves: dict[str, Curve] = {}
    for layer in progress_bar(model.layers, "measure", model.progress):
        curves |= layer_curves(load_batches(reader, layer, source, {}, model.device), recipe, weigh)
    return curves


def _warn_without_ranks(ranks: Mapping[str, int], budget: float, group_size: int) -> list[str]:
    if not ranks or any(ranks.values()):
        return []
    return [
        f"--budget-bits {budget:g} leaves nothing for compensators: codes, scales and zero points of group size "
        f"{group_size} take {base_bits(group_size):g} bits a weight; a little more gains much accuracy"
    ]


def _statistics(model: Pass, choice: RankChoice) -> Statistics:
    kurtosis: dict[str, float] = {}
    if needs_kurtosis(choice.policies):
        for layer in progress_bar(model.layers, "kurtosis", model.progress):
            for matrix, weights in model.reader.load_layer(layer, model.device):
                kurtosis[matrix.name] = excess_kurtosis(weights)
    if needs_counts(choice.policies) and not choice.expert_counts:
        raise ConversionError(
            "--ranks frequency=… needs --expert-counts FILE.json; make it with `milo stats MODEL --text FILE`"
        )
    return Statistics(kurtosis, choice.expert_counts)
