"""Quantizes matrices as they are loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_milo.offline.batches import Rule, batch_elements, plan_batches
from vllm_milo.offline.calibration.layer_moments import NoMoments
from vllm_milo.offline.checkpoint.matrices import Result, tensors_on_host
from vllm_milo.offline.nouns import Kind, Matrix, Recipe
from vllm_milo.offline.spread.job import Job, solve


def quantize_loaded(
    weights: Mapping[str, torch.Tensor], ranks: Mapping[str, int], recipe: Recipe, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return the tensors that a checkpoint would hold of some matrices, on the CPU.

    Args:
        weights: by the matrices' names, [N, K] each in a 16-bit dtype or float32.
        ranks: of their compensators, by name.
        recipe: of the solver.
        device: where it runs.

    Raises:
        ConversionError: a matrix holds NaN or Inf or cannot be quantized; it is named.
    """
    held = {Matrix(name, Kind.DENSE_FFN, *values.shape): values for name, values in weights.items()}
    solved: list[tuple[Matrix, Result]] = []
    for batch in plan_batches(held, NoMoments(), ranks, Rule(batch_elements(device))):
        values = torch.stack([held[matrix].to(device) for matrix in batch])
        names = [matrix.name for matrix in batch]
        theirs = [ranks[name] for name in names]
        job = Job(batch, values, NoMoments().of(batch, device), theirs, recipe, values.dtype, names)
        solved += solve(job, device).solved
    return tensors_on_host(solved)
