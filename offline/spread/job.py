"""A batch with all that solving it takes, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..checkpoint.matrices import Result, store_matrices
from ..checkpoint.report import MatrixReport, Report
from ..errors import ConversionError
from ..nouns import Matrix, Moments, Recipe
from ..solve.methods import Quantized, Solved, quantize_matrices
from ..source.layers import BROKEN


@dataclass(frozen=True)
class Job:
    """Matrices of one shape that are solved together.

    Attributes:
        matrices: of the batch.
        weights: theirs as the source stores them, [B, N, K], on any device.
        moments: what errors in them cost, on any device.
        ranks: of their compensators.
        recipe: of the solver.
        dtype: the model's, in which 16-bit factors are stored.
        places: file and tensor that each is from, where nobody has looked yet whether its weights are finite.
    """

    matrices: Sequence[Matrix]
    weights: torch.Tensor
    moments: Moments
    ranks: Sequence[int]
    recipe: Recipe
    dtype: torch.dtype
    places: Sequence[str] = ()


class Done(NamedTuple):
    """A solved job: its matrices in their order, what there is to say of them, and the most device memory it took."""

    solved: Sequence[tuple[Matrix, Result]]
    report: Report
    peak: int


def solve(job: Job, device: torch.device) -> Done:
    """Solve a job on a device, where its result lies afterwards.

    Raises:
        ConversionError: a matrix holds NaN or Inf or cannot be quantized; it is named.
    """
    return Done(*_solve(job, device))


def solve_to_send(job: Job, device: torch.device) -> Done:
    """Solve a job as :func:`solve` does, for another process: the result is as it will be stored."""
    solved, report, peak = _solve(job, device)
    return Done(store_matrices(solved), report, peak)


def _solve(job: Job, device: torch.device) -> tuple[list[tuple[Matrix, Solved]], Report, int]:
    weights = job.weights.to(device).float()  # in this order: the host would take longer to convert than to copy
    _refuse_broken(job, weights)
    result = _quantize_named(job, weights, _on(job.moments, device))
    report, solved = Report(), []
    report.note_sizes(job.matrices, weights, result.base.scale)
    numbers = zip(job.matrices, job.ranks, result.errors.tolist(), result.rounds.tolist(), strict=True)
    for place, (matrix, rank, error, rounds) in enumerate(numbers):
        report.matrices[matrix.name] = MatrixReport(error, rank, rounds)
        solved.append((matrix, result.one(place, rank)))
    return solved, report, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _on(moments: Moments, device: torch.device) -> Moments:
    """Return moments on a device: the same object where they are there, so that what it shares is worked out once."""
    moved = [None if part is None else part.to(device) for part in (moments.inputs, moments.outputs)]
    if moved[0] is moments.inputs and moved[1] is moments.outputs:
        return moments
    return Moments(*moved)


def _refuse_broken(job: Job, weights: torch.Tensor) -> None:
    if not job.places or torch.isfinite(weights).all():
        return
    index = int((~torch.isfinite(weights).flatten(1).all(1)).nonzero()[0])
    raise ConversionError(f"{job.places[index]} holds NaN or Inf (matrix {job.matrices[index].name}); {BROKEN}")


def _quantize_named(job: Job, weights: torch.Tensor, moments: Moments) -> Quantized:
    """Quantize a batch; on failure find the matrix that fails and name it."""
    rank = job.ranks[0] if len(set(job.ranks)) == 1 else job.ranks
    try:
        return quantize_matrices(weights, rank, job.recipe, job.dtype, moments)
    except ConversionError as error:
        for index, matrix in enumerate(job.matrices):
            one = slice(index, index + 1)
            try:
                quantize_matrices(weights[one], job.ranks[index], job.recipe, job.dtype, moments.select(one))
            except ConversionError as single_error:
                raise type(error)(f"{matrix.name}: {single_error}") from error
        raise
