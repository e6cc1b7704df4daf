"""What the accuracy benchmark compares: for each section a list of `milo quantize` argument lists, and GPTQ's options.

Ranks are fractions of the hidden size, so that they mean the same on small and large models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.accuracy.gptq import Gptq
from vllm_milo.offline.calibration.choose import NONE, PACKAGED
from vllm_milo.offline.calibration.generated_text import OWN_TEXT
from vllm_milo.offline.nouns import DENSE_KINDS, Kind, Matrix
from vllm_milo.offline.presets import PRESETS

COUNTS = "{counts}"
CALIBRATION = "{calibration}"
WINDOWS = "{windows}"
CALIBRATED_ON = {
    "": ("--calibration", PACKAGED),
    "same text": ("--calibration", CALIBRATION),
    "own text": ("--calibration", OWN_TEXT),
    "no text": ("--calibration", NONE),
}
"""What a preset may be calibrated on: the package's text, the one that GPTQ sees, what the model writes by itself. All
by as many windows as GPTQ sees."""
RANK_STEP = 8
FACTOR_BITS = 3 + 16 / 64
"""Stored bits of one value of a 3-bit factor, with its scales."""


class Contender(NamedTuple):
    """A row of a table.

    Attributes:
        name: as printed; unique within a section.
        group: the curve it is a point of; those of the paper's method start with "paper".
        arguments: of ``milo quantize``, after model and output; what stands in braces is filled in.
    """

    name: str
    group: str
    arguments: tuple[str, ...]


HQQ = Contender("HQQ", "baseline", ("--method", "hqq"))
"""Runs first in every section: gaps are measured from it."""

GPTQ_ROWS = {
    "GPTQ g64": Gptq(64),
    "GPTQ g64, act-order": Gptq(64, act_order=True),
    "GPTQ g64, real zero": Gptq(64, integer_zero=False),
    "GPTQ g32": Gptq(32),
    "GPTQ g32, act-order": Gptq(32, act_order=True),
}
"""GPTQ stores integer zero points (3 bits); with real ones it has the format of the others, 3.5 bits at g64."""


class Shape(NamedTuple):
    """The hidden size of a model, and the matrices that will be quantized."""

    hidden: int
    matrices: Sequence[Matrix]

    def rank(self, fraction: float) -> int:
        """Return a fraction of the hidden size in steps of 8, at least 8."""
        return max(RANK_STEP, round(self.hidden * fraction / RANK_STEP) * RANK_STEP)

    def mean(self, fraction: float) -> int:
        """Return a fraction of the hidden size as a mean rank, at least 1."""
        return max(1, round(self.hidden * fraction))

    def rank_bits(self, kinds: frozenset[Kind]) -> float:
        """Return the bits a weight, over all matrices, that one rank on the matrices of some kinds costs."""
        weights = sum(matrix.n * matrix.k for matrix in self.matrices)
        return sum(FACTOR_BITS * (m.n + m.k) for m in self.matrices if m.kind in kinds) / weights


def main_section(shape: Shape, rounds: int) -> list[Contender]:
    """Return baselines, the paper's method over policies and ranks, and the presets at the bars' budgets."""
    baselines = [
        Contender("RTN", "baseline", ("--method", "rtn")),
        Contender("HQQ g128", "baseline", ("--method", "hqq", "--group-size", "128")),
        Contender("least squares", "baseline", ("--method", "mse")),
        Contender("least squares g128", "baseline", ("--method", "mse", "--group-size", "128")),
    ]
    presets = [preset("balanced", bits) for bits in (3.5, 3.55, 3.6, 3.75)]
    presets += [preset("balanced", bits, "same text") for bits in (3.5, 3.59, 3.6, 3.75)]
    presets += [preset("balanced", bits, "own text") for bits in (3.6, 3.75)]
    presets += [preset("balanced", 3.6, "no text")]
    presets += [preset("best", bits) for bits in (3.5, 3.6)]
    presets += [preset("best", bits, "same text") for bits in (3.59, 3.6)]
    presets += [preset("small", bits) for bits in (3.25, 3.3, 3.4)]
    presets += [preset("small", 3.297, "same text")]
    presets += [preset("fast", bits) for bits in (3.3, 3.5, 3.6, 3.75)]
    presets += [Contender("preset paper-s1", "ours", ("--preset", "paper-s1"))]
    presets += [Contender("preset paper-s2", "ours", ("--preset", "paper-s2"))]
    return [*baselines, *paper_sweep(shape, rounds), *presets]


def paper_sweep(shape: Shape, rounds: int) -> list[Contender]:
    """Return ``--method paper`` for every policy, and for the composites, over ranks."""
    thin = sorted({shape.rank(f) for f in (1 / 32, 1 / 16, 1 / 8)})
    mean = sorted({shape.mean(f) for f in (1 / 128, 1 / 64, 1 / 32, 1 / 16)})
    dense = sorted({shape.rank(f) for f in (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4)})
    pairs = [(1 / 8, 1 / 128), (1 / 8, 1 / 64), (1 / 4, 1 / 64), (1 / 4, 1 / 32), (1 / 2, 1 / 32)]
    policies = {
        "uniform": [f"uniform={r}" for r in thin],
        "dense": [f"dense={r}" for r in dense],
        "sparse": [f"sparse={r}" for r in thin],
        "kurtosis": [f"kurtosis={r}" for r in mean],
        "frequency": [f"frequency={r}" for r in mean],
        "dense + kurtosis": [f"dense={shape.rank(d)},kurtosis={shape.mean(s)}" for d, s in pairs],
        "dense + frequency": [f"dense={shape.rank(d)},frequency={shape.mean(s)}" for d, s in pairs],
    }
    composites = {
        "s1": f"dense={shape.rank(1 / 8)},kurtosis={shape.mean(1 / 256)}",
        "s2": f"dense={shape.rank(1 / 4)},kurtosis={shape.mean(1 / 128)}",
    }
    rows = [
        paper(f"paper {ranks}", f"paper {policy}", ranks, rounds)
        for policy, sweep in policies.items()
        for ranks in sweep
    ]
    return rows + [paper(f"paper {name}-like", "paper s1, s2", ranks, rounds) for name, ranks in composites.items()]


def large_section(shape: Shape, rounds: int) -> list[Contender]:
    """Return the key contenders for a model on which each takes long, the ones that matter most first."""
    small, large = round(3.5 * 1.015, 4), round(3.5 * 1.03, 4)
    head = [
        Contender("RTN", "baseline", ("--method", "rtn")),
        preset("balanced", small),
        preset("fast", small),
        preset("best", large, "same text"),
        preset("balanced", small, "same text"),
        preset("balanced", small, "own text"),
    ]
    fractions = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
    dense = [paper(f"paper dense={r}", "paper dense", f"dense={r}", rounds) for r in map(shape.rank, fractions)]
    tail = [
        preset("balanced", 3.6),
        preset("fast", 3.6),
        preset("best", 3.6),
        preset("best", 3.6, "same text"),
        preset("balanced", 3.75),
        preset("fast", 3.75),
        preset("best", 3.297, "same text"),
        preset("best", 3.59, "same text"),
        preset("small", 3.3),
        preset("small", 3.25),
        preset("balanced", large),
    ]
    wide = [
        f"dense={shape.rank(1 / 16)},kurtosis={shape.mean(1 / 256)}",
        f"dense={shape.rank(1 / 8)},kurtosis={shape.mean(1 / 128)}",
        f"dense={shape.rank(1 / 8)},kurtosis={shape.mean(1 / 32)}",
        f"dense={shape.rank(1 / 4)},kurtosis={shape.mean(1 / 64)}",
    ]
    tail += [paper(f"paper {ranks}", "paper dense + kurtosis", ranks, rounds) for ranks in wide]
    uniform = [paper(f"paper uniform={r}", "paper uniform", f"uniform={r}", rounds) for r in (8, shape.rank(1 / 32))]
    sparse = [paper(f"paper sparse={r}", "paper sparse", f"sparse={r}", rounds) for r in (8, shape.rank(1 / 32))]
    return [*head, *dense[:3], *tail, dense[3], *uniform, *sparse]


def iterations_section(shape: Shape, _: int) -> list[Contender]:
    """Return the paper's method stopped after more and more rounds (its Fig. 10)."""
    ranks = f"uniform={shape.rank(1 / 16)}"
    return [paper(f"{n} rounds", "paper rounds", ranks, n) for n in (1, 2, 3, 5, 8, 12, 16, 20)]


def factors_section(shape: Shape, rounds: int) -> list[Contender]:
    """Return factors in 3, 8 and 16 bits over uniform ranks (its Table 5 and Fig. 11)."""
    return [
        paper(f"{bits} uniform={r}", f"paper {bits}", f"uniform={r}", rounds, "--factors", bits)
        for r in sorted({shape.rank(f) for f in (1 / 32, 1 / 16, 1 / 8)})
        for bits in ("int3", "int8", "16")
    ]


def policies_section(shape: Shape, _: int) -> list[Contender]:
    """Return the policies at equal bytes, alone and beside dense ranks, after one round (its Fig. 7)."""
    sparse_bits = shape.rank_bits(frozenset({Kind.ROUTED_EXPERT}))
    dense_bits = shape.rank_bits(DENSE_KINDS)
    sparse = shape.rank(1 / 32)
    budget = sparse * sparse_bits
    dense = round(budget / dense_bits / RANK_STEP) * RANK_STEP
    beside = shape.rank(1 / 8)
    alone = [
        f"uniform={shape.rank(budget / (sparse_bits + dense_bits) / shape.hidden)}",
        f"dense={max(RANK_STEP, dense)}",
        f"sparse={sparse}",
        f"kurtosis={sparse}",
        f"frequency={sparse}",
    ]
    composite = [f"dense={beside},{policy}={sparse}" for policy in ("sparse", "kurtosis", "frequency")]
    composite.append(f"dense={beside + max(RANK_STEP, dense)}")
    return [paper(ranks, "paper policies", ranks, 1) for ranks in (*alone, *composite)]


SECTIONS = {
    "main": main_section,
    "iterations": iterations_section,
    "factors": factors_section,
    "policies": policies_section,
    "large": large_section,
}


def paper(name: str, group: str, ranks: str, rounds: int, *more: str) -> Contender:
    """Return a contender of the paper's method."""
    arguments = ("--method", "paper", "--ranks", ranks, "--max-rounds", str(rounds), *more)
    return Contender(name, group, arguments + (("--expert-counts", COUNTS) if "frequency" in ranks else ()))


def preset(name: str, bits: float, on: str = "") -> Contender:
    """Return a preset at a budget of stored bits a weight, calibrated on the package's text or as ``on`` says."""
    arguments: tuple[str, ...] = ("--preset", name, "--budget-bits", f"{bits:g}")
    if not PRESETS[name].calibrated:
        return Contender(f"{name} {bits:g}", f"ours {name}", arguments)
    arguments += CALIBRATED_ON[on] + (() if on == "no text" else ("--calibration-windows", WINDOWS))
    said = f", {on}" if on else ""
    return Contender(f"{name} {bits:g}{said}", f"ours {name}{said}", arguments)
