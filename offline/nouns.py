"""The nouns of the converter, which every part of it may import: what a matrix is and how a model is quantized.

A :class:`Matrix` is what gets quantized, and its :class:`Kind` says what it is part of. Its :class:`Moments` say what
errors in it cost. A :class:`Recipe` holds the choices for all matrices of a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import NamedTuple

import torch

from vllm_milo.checkpoint import GROUP_SIZES


class Kind(StrEnum):
    """What a quantized matrix is part of."""

    ATTENTION = "attention"
    DENSE_FFN = "dense_ffn"
    SHARED_EXPERT = "shared_expert"
    ROUTED_EXPERT = "routed_expert"


RANK_MULTIPLE = 8
"""Ranks are multiples of this. The kernels pad those of each matrix to blocks of 16; finer steps would waste more."""
DENSE_KINDS = frozenset({Kind.ATTENTION, Kind.SHARED_EXPERT, Kind.DENSE_FFN})
"""What every token passes."""


class Matrix(NamedTuple):
    """A matrix that will be quantized: its module name, kind, shape and, for routed experts, its place."""

    name: str
    kind: Kind
    n: int
    k: int
    experts: str | None = None
    expert: int | None = None

    @property
    def max_rank(self) -> int:
        """Return the largest rank that fits, a multiple of the rank step."""
        return min(self.n, self.k) // RANK_MULTIPLE * RANK_MULTIPLE


EXPERT_PIECES = 8
"""Pieces, at most, in which one role of a layer's experts is trained; each may lie on another device."""

LoadedMatrix = tuple[Matrix, torch.Tensor]
"""A matrix and its weights, float32 [N, K]."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of a batch of matrices [B, N, K], float32.

    Attributes:
        inputs: E[x·xᵀ] [B, K, K], its diagonal [B, K], or None for the identity; of a first size 1 where all matrices
            of the batch share it.
        outputs: second moment of the gradients at the outputs, [B, N, N], [B, N] or None.
    """

    inputs: torch.Tensor | None = None
    outputs: torch.Tensor | None = None

    def select(self, index: torch.Tensor | slice) -> Moments:
        """Return the moments of a part of the batch."""
        return Moments(select_part(self.inputs, index), select_part(self.outputs, index))


def select_part(part: torch.Tensor | None, index: torch.Tensor | slice) -> torch.Tensor | None:
    """Return what belongs to a part of a batch: ``part[index]``, or all of what the whole batch shares."""
    return part if part is None or len(part) == 1 else part[index]


METHODS = ("milo", "paper", "rtn", "hqq", "mse")
"""How matrices are quantized; see :class:`Recipe`."""
PLAIN_METHODS = ("rtn", "hqq", "mse")
"""Methods without compensators."""


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized.

    Attributes:
        method: ``milo`` is this project's joint loop, ``paper`` MiLo as published; ``rtn``, ``hqq`` and ``mse``
            quantize without compensators.
        group_size: weights along K that share a scale and a zero point, where it divides K (:meth:`group_size_for`).
        factor_bits: storage of the factors: 3, 8 or 16.
        max_rounds: alternating rounds; ``paper`` may stop earlier.
        seed: of the random sketches.
        feedback_rounds: last rounds of ``milo`` in which a base whose inputs have full second moments feeds each
            column's error into the columns to come; None for all rounds. That takes most of a round's time.
        base: quantizer of method ``milo`` under its compensator: ``least squares``, which wants to know the inputs'
            second moments, or ``hqq``, whose norm is robust where nothing is known of them (see
            :mod:`.solve.base.robust`).
        narrow: numbers of inputs K whose matrices get smaller groups, and which.
        integer_zeros: whether zero points of methods without compensators are integers from 0 to 7, as other tools'
            formats want them; see :mod:`.solve.base.integer_zeros`.
    """

    method: str = "milo"
    group_size: int = 64
    factor_bits: int = 3
    max_rounds: int = 20
    seed: int = 0
    feedback_rounds: int | None = None
    base: str = "least squares"
    narrow: tuple[tuple[int, int], ...] = ()
    integer_zeros: bool = False

    def group_size_for(self, k: int) -> int:
        """Return the group size of matrices with ``k`` inputs: the wanted one, or the largest smaller one that fits.

        Where none fits it is the wanted one: the format's own check refuses the matrix and names it.
        """
        return dict(self.narrow).get(k) or _largest_group_size(k, self.group_size)


@cache
def _largest_group_size(k: int, wanted: int) -> int:
    return max((size for size in GROUP_SIZES if size <= wanted and k % size == 0), default=wanted)
