"""Measures what each role of a layer needs, while the layer is in memory, and shares the layer's bits by it.

The layer keeps the bits that the plan by kind gives it and gets its part of those that the plan leaves, so the model
keeps its budget. What a rank takes from the error is not derived from spectra: those of the base's error and of the
weights both miss it, by factors from 0.4 to 3 (two trained models of 25 M parameters, 2026-11-27), since base and
compensator are fitted to each other and factors are stored in few bits. The solver itself is tried at a few ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..batches import batches
from ..calibration.sequential import SequentialPass, Visit
from ..learn.damage import Damage, Replacement
from ..nouns import LoadedMatrix, Matrix, Moments, Recipe
from ..ranks.budget import rank_bits
from ..ranks.need import Need, group_roles, probe_ranks, share_by_need
from ..served.target import Target, allow
from ..solve.base.least_squares import quantize_mse
from ..solve.methods import quantize_matrices
from ..solve.metric import metric_of

WINDOWS = 8
"""Windows of the calibration text that damage is measured on, evenly spread."""
PROBED_EXPERTS, PROBED_WEIGHTS = 4, 2**25
"""Routed experts that a role is tried on: those that saw most tokens, fewer where they are large, at least one."""
BASE_FITS = 1
"""Regressions of the base that damage is measured with; it is compared between roles, and nothing of it is kept."""


class NeedMeter:
    """Measures one layer after the other.

    Args:
        recipe: of the solver.
        dtype: the model's.
        batch: windows that run at once.
        spare: stored bits a weight that the plan by kind leaves of the budget. It does so where a step of all routed
            experts costs more; one of their projections may be worth it.
        target: what the ranks of each layer may cost in serving; None for no limit.
    """

    def __init__(
        self, recipe: Recipe, dtype: torch.dtype, batch: int, spare: float = 0.0, target: Target | None = None
    ) -> None:
        # neither column by column nor for long: this compares ranks, and nothing of it is kept
        self._recipe = replace(recipe, feedback_rounds=0, max_rounds=min(2, recipe.max_rounds))
        self._dtype, self._batch, self._spare, self._target = dtype, batch, spare, target

    @torch.no_grad()
    def share(
        self, stream: SequentialPass, visit: Visit, matrices: Sequence[Matrix], planned: Mapping[str, int]
    ) -> tuple[dict[str, int], dict[str, Any]]:
        """Return the ranks of a layer's matrices by name, and what was measured of its roles, as JSON.

        Args:
            stream: of the calibration text.
            visit: the layer that it has come to, which has its original weights, afterwards too.
            matrices: those to quantize.
            planned: ranks by kind; what their factors take, and the layer's part of the spare bits, is what it has.
        """
        roles = group_roles(matrices)
        bits = sum(planned[matrix.name] * rank_bits(matrix, self._recipe.factor_bits) for matrix in matrices)
        bits += int(self._spare * sum(matrix.n * matrix.k for matrix in matrices))
        if len(roles) < 2 or not bits:
            return {matrix.name: planned[matrix.name] for matrix in matrices}, {}
        states = stream.quantized[:: -(-len(stream.quantized) // WINDOWS)]
        damage = Damage(stream.model, visit.index, visit.module, states, self._batch)
        needs = {role: self._need(visit, damage, of, planned[of[0].name]) for role, of in roles.items()}
        allowance = allow(matrices, self._recipe, self._target)
        ranks = share_by_need(roles, needs, bits, self._recipe.factor_bits, allowance)
        said = {role: {**need._asdict(), "rank": ranks[role]} for role, need in needs.items()}
        return {matrix.name: ranks[role] for role, of in roles.items() for matrix in of}, said

    def _need(self, visit: Visit, damage: Damage, matrices: Sequence[Matrix], planned: int) -> Need:
        loaded = visit.loaded(matrices)
        tokens = visit.moments.tokens
        size = max(1, min(PROBED_EXPERTS, PROBED_WEIGHTS // (matrices[0].n * matrices[0].k)))
        probed = sorted(loaded, key=lambda member: -tokens.get(member[0].name, 0))[:size]
        left = self._left(visit, probed, probe_ranks(matrices[0], planned))
        return Need(damage.of(self._replacements(visit, loaded)), left)

    def _replacements(self, visit: Visit, loaded: Sequence[LoadedMatrix]) -> Iterator[Replacement]:
        """Yield the matrices of a role, each with what quantizing it without a compensator makes of it."""
        places = dict(loaded)
        for batch in batches(loaded, visit.moments, {}):
            importance = metric_of(_diagonal(batch.moments)).importance(of_inputs=True)
            group_size = self._recipe.group_size_for(batch.weights.shape[-1])
            values = quantize_mse(batch.weights, group_size, importance, fits=BASE_FITS).dequantize()
            yield from ((places[matrix], one) for matrix, one in zip(batch.matrices, values, strict=True))

    def _left(self, visit: Visit, loaded: Sequence[LoadedMatrix], ranks: Sequence[int]) -> dict[int, float]:
        """Return the share of the error without a compensator that is left at each rank, all matrices together."""
        costs = dict.fromkeys((0, *ranks), 0.0)
        for batch in batches(loaded, visit.moments, {}):
            moments = _diagonal(batch.moments)
            metric = metric_of(moments)
            for rank in costs:
                found = quantize_matrices(batch.weights, rank, self._recipe, self._dtype, moments).dequantize()
                costs[rank] += float(metric.cost(batch.weights - found).sum())
        return {rank: costs[rank] / max(costs[0], 1e-30) for rank in ranks}


def _diagonal(moments: Moments) -> Moments:
    inputs = moments.inputs
    return moments if inputs is None or inputs.dim() == 2 else Moments(inputs.diagonal(dim1=-2, dim2=-1).contiguous())
