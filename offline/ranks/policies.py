"""Rank policies: how many ranks of compensator each matrix gets.

``--ranks dense=512,kurtosis=16`` names policies; each gives a rank to the matrices it covers and the ranks
add up. A sum is capped at min(N, K) with a warning and rounded to a multiple of 8, since the kernels read
factors in rows of ranks and finer steps would waste them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from ..errors import ConversionError
from ..nouns import DENSE_KINDS, RANK_MULTIPLE, Kind, Matrix

KURTOSIS_DOUBLINGS = 6.0
"""Excess kurtosis counts up to this much above the smallest of the model: each 1 doubles the rank."""


class Statistics(NamedTuple):
    """What data-driven policies need: excess kurtosis by matrix, and uses of each expert by experts' name."""

    kurtosis: Mapping[str, float] = {}
    expert_counts: Mapping[str, Sequence[int]] = {}


class Policy(NamedTuple):
    """One ``name=rank`` of ``--ranks``."""

    name: str
    rank: int


RankAssignment = dict[str, float]
PolicyFunction = Callable[[Sequence[Matrix], int, Statistics], RankAssignment]


def parse_policies(text: str) -> list[Policy]:
    """Parse ``dense=512,kurtosis=16``; an empty text is no policy.

    Raises:
        ConversionError: an unknown policy, or a rank that is no positive number.
    """
    policies = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = item.partition("=")
        if name not in POLICIES:
            raise ConversionError(f"--ranks: unknown policy {name!r}; known are {', '.join(POLICIES)}")
        if not value.isdecimal() or int(value) == 0:
            raise ConversionError(f"--ranks: {item!r} needs a rank above 0, as in {name}=16")
        if name == "kurtosis-paper" and int(value) not in _PAPER_EXPONENTS:
            raise ConversionError("--ranks: kurtosis-paper has ranks 16 and 32, as the release; use kurtosis=r")
        policies.append(Policy(name, int(value)))
    return policies


def needs_kurtosis(policies: Iterable[Policy]) -> bool:
    """Return whether a policy needs the kurtosis of the routed experts (one more pass over the weights)."""
    return any(policy.name.startswith("kurtosis") for policy in policies)


def needs_counts(policies: Iterable[Policy]) -> bool:
    """Return whether a policy needs expert counts."""
    return any(policy.name == "frequency" for policy in policies)


def assign_ranks(
    policies: Sequence[Policy], matrices: Sequence[Matrix], statistics: Statistics
) -> tuple[dict[str, int], list[str]]:
    """Return the rank of every matrix, and warnings about ranks that were capped.

    Args:
        policies: what :func:`parse_policies` returned.
        matrices: all matrices that will be quantized.
        statistics: what the policies need; see :func:`needs_kurtosis` and :func:`needs_counts`.

    Raises:
        ConversionError: expert counts are missing or do not fit the model.
    """
    wanted: dict[str, float] = defaultdict(float)
    for policy in policies:
        for name, rank in POLICIES[policy.name](matrices, policy.rank, statistics).items():
            wanted[name] += rank
    ranks = {}
    capped: list[Matrix] = []
    for matrix in matrices:
        rank = round_rank(wanted[matrix.name])
        if rank > matrix.max_rank:
            capped.append(matrix)
        ranks[matrix.name] = min(rank, matrix.max_rank)
    return ranks, _cap_warning(capped, wanted)


def round_rank(rank: float) -> int:
    """Round to the nearest multiple of 8, halves up."""
    return int(rank / RANK_MULTIPLE + 0.5) * RANK_MULTIPLE


def share_ranks(weights: Mapping[str, float], rank: int, limits: Mapping[str, int]) -> RankAssignment:
    """Share ranks of mean ``rank`` in proportion to ``weights``, in steps of 8, none above its limit.

    What a limit cuts off goes to the others; remainders of a step go where they are largest. The mean is
    ``rank`` within one step over all matrices, unless every limit is reached.
    """
    budget = rank * len(weights) / RANK_MULTIPLE
    ceiling = {name: limit // RANK_MULTIPLE for name, limit in limits.items()}
    exact = _fill(weights, budget, ceiling)
    steps = {name: int(share) for name, share in exact.items()}
    left = round(min(budget, sum(ceiling.values()))) - sum(steps.values())
    for name in sorted(exact, key=lambda name: steps[name] - exact[name]):
        if left <= 0:
            break
        if steps[name] < ceiling[name]:
            steps[name] += 1
            left -= 1
    return {name: float(count * RANK_MULTIPLE) for name, count in steps.items()}


def _fill(weights: Mapping[str, float], budget: float, ceiling: Mapping[str, int]) -> dict[str, float]:
    """Split ``budget`` in proportion to ``weights`` under ceilings (water filling)."""
    shares = dict.fromkeys(weights, 0.0)
    free = {name for name, weight in weights.items() if weight > 0 and ceiling[name] > 0}
    while free and budget > 1e-9:
        total = sum(weights[name] for name in free)
        full = {name for name in free if weights[name] / total * budget >= ceiling[name]}
        for name in full or free:
            shares[name] = float(ceiling[name]) if full else weights[name] / total * budget
        if not full:
            break
        budget -= sum(ceiling[name] for name in full)
        free -= full
    return shares


def _constant(kinds: frozenset[Kind]) -> PolicyFunction:
    def policy(matrices: Sequence[Matrix], rank: int, _: Statistics) -> RankAssignment:
        step = float(max(RANK_MULTIPLE, round_rank(rank)))
        return {matrix.name: step for matrix in matrices if matrix.kind in kinds}

    return policy


def _kurtosis(matrices: Sequence[Matrix], rank: int, statistics: Statistics) -> RankAssignment:
    """Rank proportional to 2^(excess kurtosis), as in the release, but monotone and of mean ``rank``.

    Kurtosis counts from the smallest of the model to 6 above it, so one outlier cannot take every rank.
    """
    routed = [matrix for matrix in matrices if matrix.kind is Kind.ROUTED_EXPERT]
    if not routed:
        return {}
    values = {matrix.name: statistics.kurtosis[matrix.name] for matrix in routed}
    lowest = min(values.values())
    weights = {name: 2.0 ** min(value - lowest, KURTOSIS_DOUBLINGS) for name, value in values.items()}
    return share_ranks(weights, rank, {matrix.name: matrix.max_rank for matrix in routed})


_PAPER_EXPONENTS = {16: 2, 32: 3}


def _kurtosis_paper(matrices: Sequence[Matrix], rank: int, statistics: Statistics) -> RankAssignment:
    """Return the release's literal rule: 0 if k < 1, 2^(k + c) up to k = 9, 1024 above, k rounded."""
    ranks = {}
    for matrix in matrices:
        if matrix.kind is Kind.ROUTED_EXPERT:
            k = round(statistics.kurtosis[matrix.name])
            exponent = k + _PAPER_EXPONENTS[rank]
            ranks[matrix.name] = 0.0 if k < 1 else float(2**exponent if k <= 9 else 1024)
    return ranks


def _frequency(matrices: Sequence[Matrix], rank: int, statistics: Statistics) -> RankAssignment:
    """Rank proportional to how often the router picks the expert, of mean ``rank`` in each layer."""
    layers: dict[str, list[Matrix]] = defaultdict(list)
    for matrix in matrices:
        if matrix.experts is not None:
            layers[matrix.experts].append(matrix)
    ranks: RankAssignment = {}
    for experts, members in layers.items():
        counts = _layer_counts(experts, members, statistics)
        weights = {str(expert): float(count) for expert, count in enumerate(counts)}
        limits = {str(m.expert): m.max_rank for m in members}
        shares = share_ranks(weights, rank, limits)
        ranks |= {matrix.name: shares[str(matrix.expert)] for matrix in members}
    return ranks


def _layer_counts(experts: str, members: Sequence[Matrix], statistics: Statistics) -> Sequence[int]:
    number = 1 + max(matrix.expert or 0 for matrix in members)
    counts = statistics.expert_counts.get(experts)
    if counts is None:
        raise ConversionError(
            f"frequency ranks need expert counts of {experts}; "
            f"make them with `milo stats MODEL --text FILE -o counts.json` and pass --expert-counts counts.json"
        )
    if len(counts) != number or sum(counts) <= 0 or min(counts) < 0:
        raise ConversionError(
            f"expert counts of {experts}: expected {number} counts, not all 0, found {list(counts)[:8]}"
            f"{' …' if len(counts) > 8 else ''} ({len(counts)}); make them again with `milo stats`"
        )
    return counts


def _cap_warning(capped: Sequence[Matrix], wanted: Mapping[str, float]) -> list[str]:
    if not capped:
        return []
    first = capped[0]
    return [
        f"{len(capped)} matrices cannot hold the rank asked for and get min(N, K), "
        f"e.g. {first.name}: {wanted[first.name]:.0f} -> {first.max_rank}"
    ]


POLICIES: dict[str, PolicyFunction] = {
    "uniform": _constant(frozenset(Kind)),
    "dense": _constant(DENSE_KINDS),
    "sparse": _constant(frozenset({Kind.ROUTED_EXPERT})),
    "kurtosis": _kurtosis,
    "kurtosis-paper": _kurtosis_paper,
    "frequency": _frequency,
}
