"""Decides the rank of every matrix before the conversion: by policies, by a byte budget, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..errors import ConversionError
from ..nouns import Matrix, Recipe
from ..progress import progress_bar
from ..served.target import find_target
from ..source.layers import Layer
from ..source.reader import ModelReader
from .budget import scale_policies
from .policies import Policy, Statistics, assign_ranks, needs_counts, needs_kurtosis
from .roles import share_budget


@dataclass(frozen=True)
class RankChoice:
    """What decides the ranks of a model.

    Attributes:
        policies: rank policies, added up; with a budget they are scaled to fit it.
        budget_bits: average stored bits of a quantized weight, everything counted; without policies the ranks go
            by what a matrix is part of (:mod:`.roles`).
        expert_counts: uses of each expert, by experts' name; for the frequency policy.
        serving_share: the most that ranks by what a matrix is part of may cost in serving, over what codes cost
            (:mod:`..served.target`); None for no limit.
    """

    policies: Sequence[Policy]
    budget_bits: float | None
    expert_counts: Mapping[str, Sequence[int]]
    serving_share: float | None = None


class Pass(NamedTuple):
    """One more pass over the weights of a model: its layers without what is ignored, and where they are worked on."""

    reader: ModelReader
    layers: Sequence[Layer]
    device: torch.device
    progress: bool


def plan_ranks(model: Pass, choice: RankChoice, recipe: Recipe) -> tuple[dict[str, int], list[str]]:
    """Return the rank of every matrix, and warnings.

    Args:
        model: the layers whose matrices get ranks.
        choice: policies, budget, statistics.
        recipe: group size, factor bits and seed.

    Raises:
        ConversionError: a policy lacks its statistics, or the budget cannot be kept.
    """
    matrices = [held.matrix for layer in model.layers for held in layer.matrices]
    _check_counts(choice)
    if choice.budget_bits is not None and not choice.policies:
        target = find_target(choice.serving_share, model.reader.config)
        return share_budget(matrices, choice.budget_bits, recipe, target)
    statistics = _statistics(model, choice)
    if choice.budget_bits is None:
        return assign_ranks(choice.policies, matrices, statistics)
    return scale_policies(matrices, choice.policies, statistics, recipe, choice.budget_bits)


def known_from_headers(choice: RankChoice) -> bool:
    """Return whether ranks follow from the shapes of the matrices, without a look at their weights."""
    return not needs_kurtosis(choice.policies)


def assume_ranks(matrices: Sequence[Matrix], choice: RankChoice, recipe: Recipe) -> dict[str, int]:
    """Return ranks as they are if all matrices have the same kurtosis: as many in all, but evenly shared.

    Raises:
        ConversionError: as :func:`plan_ranks`.
    """
    _check_counts(choice)
    statistics = Statistics(dict.fromkeys((matrix.name for matrix in matrices), 0.0), choice.expert_counts)
    if choice.budget_bits is None:
        return assign_ranks(choice.policies, matrices, statistics)[0]
    return scale_policies(matrices, choice.policies, statistics, recipe, choice.budget_bits)[0]


def excess_kurtosis(values: torch.Tensor) -> float:
    """Return E[(x - μ)⁴]/σ⁴ - 3 over all entries (the paper's section 2.1), 0 for a constant matrix."""
    centered = values.double() - values.double().mean()
    variance = centered.square().mean()
    return float(centered.pow(4).mean() / variance.square() - 3) if variance > 0 else 0.0


def _statistics(model: Pass, choice: RankChoice) -> Statistics:
    kurtosis: dict[str, float] = {}
    if needs_kurtosis(choice.policies):
        for layer in progress_bar(model.layers, "kurtosis", model.progress):
            for matrix, weights in model.reader.load_layer(layer, model.device):
                kurtosis[matrix.name] = excess_kurtosis(weights)
    return Statistics(kurtosis, choice.expert_counts)


def _check_counts(choice: RankChoice) -> None:
    if needs_counts(choice.policies) and not choice.expert_counts:
        raise ConversionError(
            "--ranks frequency=… needs --expert-counts FILE.json; make it with `milo stats MODEL --text FILE`"
        )
    if choice.expert_counts and not needs_counts(choice.policies):
        raise ConversionError("--expert-counts is for --ranks frequency=R alone, which is not asked for; drop one")
