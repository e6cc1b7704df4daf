"""Quantizes matrices as they are loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_milo.names import leaf_of
from vllm_milo.offline.batches import Rule, batch_elements, plan_batches
from vllm_milo.offline.calibration.layer_moments import NoMoments
from vllm_milo.offline.checkpoint.matrices import Stored
from vllm_milo.offline.nouns import Kind, Matrix, Recipe
from vllm_milo.offline.spread.job import Job, solve_to_send


def quantize_loaded(
    weights: Mapping[str, torch.Tensor], ranks: Mapping[str, int], recipe: Recipe, device: torch.device
) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors that a checkpoint would hold of some matrices, on the CPU: by matrix, then by last name.

    Args:
        weights: by the matrices' names, [N, K] each in a 16-bit dtype or float32.
        ranks: of their compensators, by name.
        recipe: of the solver.
        device: where it runs.

    Raises:
        ConversionError: a matrix holds NaN or Inf or cannot be quantized; it is named.
    """
    held = {Matrix(name, Kind.DENSE_FFN, *values.shape): values for name, values in weights.items()}
    moments, found = NoMoments(), {}
    for batch in plan_batches(held, moments, ranks, Rule(batch_elements(device))):
        values = torch.stack([held[matrix].to(device) for matrix in batch])
        names = [matrix.name for matrix in batch]
        theirs = [ranks[name] for name in names]
        job = Job(batch, values, moments.of(batch, device), theirs, recipe, values.dtype, names)
        for matrix, stored in solve_to_send(job, device).solved:
            assert isinstance(stored, Stored)
            found[matrix.name] = {leaf_of(name): tensor for name, tensor in stored.tensors.items()}
    return found
