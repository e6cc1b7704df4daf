"""How a model is quantized: the choices that hold for all of its matrices."""

from __future__ import annotations

from dataclasses import dataclass

MAX_ROUNDS = 20

METHODS = ("milo", "paper", "rtn", "hqq", "mse")
PLAIN_METHODS = ("rtn", "hqq", "mse")
"""Methods without compensators."""


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized.

    Attributes:
        method: ``milo`` is this project's joint loop, ``paper`` MiLo as published; ``rtn``, ``hqq`` and ``mse``
            quantize without compensators.
        group_size: weights along K that share a scale and a zero point.
        factor_bits: storage of the factors: 3, 8 or 16.
        max_rounds: alternating rounds; ``paper`` may stop earlier.
        seed: of the random sketches.
        feedback_rounds: last rounds of ``milo`` in which a base whose inputs have full second moments feeds each
            column's error into the columns to come; None for all rounds. That takes most of a round's time.
    """

    method: str = "milo"
    group_size: int = 64
    factor_bits: int = 3
    max_rounds: int = MAX_ROUNDS
    seed: int = 0
    feedback_rounds: int | None = None
