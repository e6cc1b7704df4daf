"""A batch with all that solving it takes, and what comes of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..checkpoint.matrices import Result, store_matrices
from ..checkpoint.report import MatrixReport, Report
from ..errors import ConversionError
from ..nouns import Matrix, Moments, Recipe
from ..solve.methods import Quantized, Solved, quantize_matrices
from ..source.formats.encoding import Encoded
from ..source.layers import BROKEN
from ..source.parts import Part, Stored, on_device, read_part


class Unread(NamedTuple):
    """Weights of a batch that are still in files which stay there, so that whoever solves the batch may read them."""

    parts: Sequence[Part]


@dataclass(frozen=True)
class Job:
    """Matrices of one shape that are solved together.

    Attributes:
        matrices: of the batch.
        weights: theirs as the source stores them, [B, N, K], on any device, or each by itself where some are stored
            with fewer than 16 bits; or where they are to be read.
        moments: what errors in them cost, on any device.
        ranks: of their compensators.
        recipe: of the solver.
        dtype: the model's, in which 16-bit factors are stored.
        places: file and tensor that each is from, where nobody has looked yet whether its weights are finite.
        reading: seconds that reading them took.
    """

    matrices: Sequence[Matrix]
    weights: torch.Tensor | Sequence[Stored] | Unread
    moments: Moments
    ranks: Sequence[int]
    recipe: Recipe
    dtype: torch.dtype
    places: Sequence[str] = ()
    reading: float = 0.0

    def read(self, pinned: bool) -> Job:
        """Return the job with its weights in memory.

        Args:
            pinned: whether they go to a GPU, which copies several times as fast from memory that is not paged.

        Raises:
            PassingError: a file cannot be read.
        """
        if not isinstance(self.weights, Unread):
            return self
        start = time.monotonic()
        weights = stacked([read_part(part) for part in self.weights.parts], pinned)
        return replace(self, weights=weights, reading=time.monotonic() - start)


def stacked(parts: Sequence[Stored], pinned: bool) -> torch.Tensor | list[Stored]:
    """Return matrices of one shape as they are stored, [B, N, K]; in float32 where their dtypes differ.

    Where some are stored with fewer than 16 bits, each is by itself.

    Args:
        parts: [N, K] each; files in memory, which are read from the disk here.
        pinned: see :meth:`Job.read`.
    """
    plain = [part for part in parts if isinstance(part, torch.Tensor)]
    if len(plain) < len(parts):
        return [part.in_memory(pinned) if isinstance(part, Encoded) else part.clone() for part in parts]
    dtype = plain[0].dtype if len({part.dtype for part in plain}) == 1 else torch.float32
    into = torch.empty(len(plain), *plain[0].shape, dtype=dtype, pin_memory=pinned)
    for place, part in zip(into, plain, strict=True):
        place.copy_(part)
    return into


def _weights_on(weights: torch.Tensor | Sequence[Stored], device: torch.device) -> torch.Tensor:
    """Return the weights of a batch in float32 [B, N, K]; those with fewer than 16 bits become values one at a time."""
    if isinstance(weights, torch.Tensor):
        return weights.to(device).float()  # in this order: the host would take longer to convert than to copy
    into = torch.empty(len(weights), *weights[0].shape, dtype=torch.float32, device=device)
    for place, one in zip(into, weights, strict=True):
        place.copy_(on_device(one, device))
    return into


class Spent(NamedTuple):
    """Seconds that a device took for reading weights, beside its other work, and for solving."""

    reading: float = 0.0
    solving: float = 0.0


class Done(NamedTuple):
    """A solved job.

    Attributes:
        solved: its matrices in their order.
        report: what there is to say of them.
        peak: the most device memory that solving took so far, in bytes.
        device: that solved it.
        spent: seconds that it took.
    """

    solved: Sequence[tuple[Matrix, Result]]
    report: Report
    peak: int
    device: torch.device
    spent: Spent


def solve(job: Job, device: torch.device) -> Done:
    """Solve a job on a device, where its result lies afterwards.

    Raises:
        ConversionError: a matrix holds NaN or Inf or cannot be quantized; it is named.
    """
    return Done(*_solve(job, device))


def solve_to_send(job: Job, device: torch.device) -> Done:
    """Solve a job as :func:`solve` does, for another process: the result is as it will be stored."""
    found = _solve(job, device)
    return Done(store_matrices(found[0]), *found[1:])


def _solve(job: Job, device: torch.device) -> tuple[list[tuple[Matrix, Solved]], Report, int, torch.device, Spent]:
    """Return what is in a :class:`Done`, in its order."""
    job, start = job.read(device.type == "cuda"), time.monotonic()
    assert not isinstance(job.weights, Unread)
    weights = _weights_on(job.weights, device)
    _refuse_broken(job, weights)
    result = _quantize_named(job, weights, _on(job.moments, device))
    report, solved = Report(), []
    report.note_sizes(job.matrices, weights, result.base.scale)
    numbers = zip(job.matrices, job.ranks, result.errors.tolist(), result.rounds.tolist(), strict=True)
    for place, (matrix, rank, error, rounds) in enumerate(numbers):
        report.matrices[matrix.name] = MatrixReport(error, rank, rounds)
        solved.append((matrix, result.one(place, rank)))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return solved, report, peak, device, Spent(job.reading, time.monotonic() - start)


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
