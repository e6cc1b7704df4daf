"""The improved alternating loop (method ``milo``): base and compensator each fitted to the other as stored.

The paper quantizes the factors once, after the loop, and nothing makes up for their error. Here the base always
quantizes W minus the *stored* compensator, and the compensator is always fitted to the error of the *stored* base, in
the metric of the second moments if there are any. The best state seen is what counts, so more rounds never hurt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import torch

from ..nouns import Moments, Recipe
from .base.error_feedback import quantize_with_feedback
from .base.group import GroupQuantized, refuse_bad_scales
from .base.hqq import quantize_hqq
from .base.least_squares import quantize_mse, refit
from .base.robust import quantize_robustly
from .compensator.low_rank import StoredPair, join_pairs, leading_rows, pad_pair, store_pair
from .metric import Metric, metric_of
from .precision import fast_products
from .states import State, choose_base, choose_state, put_better, select_base, select_state

COLD_FITS = 4
"""Regressions from each clipped range where a base begins; the rounds go on from there."""
WARM_FITS = 2
"""Regressions of a base that goes on from the round before."""
PROBE_ROUNDS = 2
"""Rounds after which the better of two beginnings is chosen; what each is worth shows after a plain step more."""
LOW_RANK_WINS, PLAIN_WINS = 0.925, 0.978
"""Bounds on the error of the low-rank beginning divided by that of the plain one. Below the first only the low-rank
beginning goes on, from the second on only the plain one, which gains more from more rounds. Between them, a third of
the matrices of small trained MoEs, both do. At these bounds 10 rounds never turned the order by more than 0.2 %."""
RELAXATION = 1.5
"""The compensator is fitted to C + 1.5·(E - C), C the last one and E the base's error: a step past the paper's, which
gets further in the same rounds; the first and the last round take the plain step."""


def quantize_jointly(
    weights: torch.Tensor, ranks: Sequence[int], moments: Moments, recipe: Recipe, dtype: torch.dtype
) -> State:
    """Quantize a batch of matrices with compensators.

    Args:
        weights: float32 [B, N, K].
        ranks: of each matrix's compensator, preferably sorted; all 0 for none.
        moments: what errors cost; see :mod:`.metric`.
        recipe: group size, factor bits, rounds, seed.
        dtype: the model's dtype, in which 16-bit factors are stored.

    Two beginnings compete in each matrix: no compensator, as in the paper, and the leading part of W itself, which
    wins where W is nearly of low rank (attention's queries and keys). After :data:`PROBE_ROUNDS` only the better one
    of each matrix goes on, unless they are close.

    Returns:
        The best state seen. Factors have the rows of the largest rank, zero beyond a matrix's own.

    Raises:
        ValueError: some ranks are 0 and others are not.
        ScaleError: a group's scale does not fit fp16.
    """
    refuse_bad_scales(weights, recipe.group_size)
    metric = metric_of(moments)
    if not any(ranks):
        return State(_Base(metric, recipe).alone(weights), None, torch.empty(0))
    loop = _Loop(weights, ranks, max(ranks), metric, recipe, dtype)
    plain, low_rank = loop.begin_plain(), loop.begin_low_rank()
    rounds = range(recipe.max_rounds)
    for step in rounds[:PROBE_ROUNDS]:
        plain, low_rank = loop.advance(plain, step), loop.advance(low_rank, step)
    rest = rounds[PROBE_ROUNDS:]
    if rest:
        plain, low_rank = loop.with_trial(plain), loop.with_trial(low_rank)
    ratio = (low_rank.state.cost / plain.state.cost.clamp(min=1e-30)).sqrt()
    path = _merge(plain, low_rank, ratio < (LOW_RANK_WINS if rest else 1))
    undecided = ((ratio >= LOW_RANK_WINS) & (ratio < PLAIN_WINS)).nonzero().flatten()
    other = _select(low_rank, undecided)
    del plain, low_rank
    best = loop.finish(path, rest)
    del path
    if rest and len(undecided):
        theirs = [ranks[index] for index in undecided.tolist()]
        part = _Loop(weights[undecided], theirs, max(ranks), metric.select(undecided), recipe, dtype)
        put_better(best, part.finish(other, rest), undecided)
    return best


@dataclass
class _Path:
    """One descent: the base, what it quantizes (``rest``, W minus the compensator), and the best state so far.

    Attributes:
        base: result of the last round.
        rest: float32 [B, N, K]; overwritten by the next round.
        start: rows [B, r, K] that span about the compensators' spaces, r the loop's rows; None without one yet.
        best: best state seen; None before the first round.
    """

    base: GroupQuantized
    rest: torch.Tensor
    start: torch.Tensor | None = None
    best: State | None = None

    @property
    def state(self) -> State:
        """Return the best state of a path that has made a round."""
        if self.best is None:
            raise ValueError("no round has been made yet")
        return self.best


class _Base:
    """The quantizer of the base for a metric; with error feedback, if wanted, where the inputs' moment is full."""

    def __init__(self, metric: Metric, recipe: Recipe) -> None:
        self._factor = metric.feedback_factor if recipe.feedback_rounds != 0 else None
        self._robust = recipe.base == "hqq"
        self._importance = metric.importance(of_inputs=True)
        self._group_size = recipe.group_size

    def alone(self, weights: torch.Tensor) -> GroupQuantized:
        """Quantize weights [B, N, K] that get no compensator."""
        if self._robust:
            return quantize_hqq(weights, self._group_size)
        return self.begin(weights, feedback=True)

    def begin(self, weights: torch.Tensor, feedback: bool) -> GroupQuantized:
        """Quantize weights [B, N, K] from scratch."""
        if self._robust:
            return quantize_robustly(weights, self._group_size)
        if self._factor is not None and feedback:
            return quantize_with_feedback(weights, self._group_size, self._factor, None, COLD_FITS)
        return quantize_mse(weights, self._group_size, self._importance, None, COLD_FITS)

    def go_on(
        self,
        weights: torch.Tensor,
        old: GroupQuantized,
        work: Sequence[torch.Tensor],
        first: bool,
        feedback: bool,
    ) -> GroupQuantized:
        """Quantize weights [B, N, K] from the result for similar ones; ``work`` is overwritten.

        The first compensator may take so much off a group that its old grid is no use, so there ranges count too.
        """
        if self._robust:
            return quantize_robustly(weights, self._group_size)
        if self._factor is not None and feedback:
            return quantize_with_feedback(weights, self._group_size, self._factor, old, WARM_FITS)
        if first:
            return quantize_mse(weights, self._group_size, self._importance, old, WARM_FITS)
        return refit(weights, old, self._group_size, self._importance, WARM_FITS, work)


class _Run(NamedTuple):
    """Consecutive matrices of a batch whose compensators have one rank."""

    part: slice
    rank: int


def _runs(ranks: Sequence[int]) -> list[_Run]:
    """Return the runs of a batch.

    Raises:
        ValueError: a rank is 0.
    """
    if 0 in ranks:
        raise ValueError("matrices without a compensator cannot be in one batch with others")
    runs, start = [], 0
    for rank, members in groupby(ranks):
        stop = start + len(list(members))
        runs.append(_Run(slice(start, stop), rank))
        start = stop
    return runs


class _Loop:
    """The rounds on one batch, with the work space that they share: tensors like the weights, two on CPUs, one on GPUs.

    Factors of all ``ranks`` have ``rows`` rows.
    """

    def __init__(
        self,
        weights: torch.Tensor,
        ranks: Sequence[int],
        rows: int,
        metric: Metric,
        recipe: Recipe,
        dtype: torch.dtype,
    ) -> None:
        self._weights = weights
        self._runs = _runs(ranks)
        self._rows = rows
        self._metric = metric
        self._recipe = recipe
        self._dtype = dtype
        self._base = _Base(metric, recipe)
        self._work = [torch.empty_like(weights) for _ in range(1 if weights.is_cuda else 2)]

    def begin_plain(self) -> _Path:
        """Return the path that begins without a compensator."""
        rest = self._weights.clone()
        return _Path(self._base.begin(rest, self._feeds_back(0)), rest)

    def begin_low_rank(self) -> _Path:
        """Return the path that begins with the best compensator of the whole W, before anything is quantized."""
        whitened = self._metric.whiten(self._weights)
        start, pair = self._compensate(whitened, None)
        rest = self._subtract(pair, torch.empty_like(self._weights))
        return _Path(self._base.begin(rest, self._feeds_back(0)), rest, start)

    def _feeds_back(self, step: int) -> bool:
        """Return whether the base of round ``step`` feeds errors forward."""
        rounds = self._recipe.feedback_rounds
        return rounds is None or step >= self._recipe.max_rounds - rounds

    def _compensate(self, whitened: torch.Tensor, start: torch.Tensor | None) -> tuple[torch.Tensor, StoredPair]:
        """Return the rows [B, r, K] that the compensators of whitened residuals begin with, and those as stored.

        ``start`` are the rows of an earlier round.
        """
        rows = whitened.new_zeros(len(whitened), self._rows, whitened.shape[-1])
        pairs = []
        for part, rank in self._runs:
            generator = torch.Generator(whitened.device).manual_seed(self._recipe.seed)
            begin = None if start is None else start[part, :rank]
            _, rows[part, :rank] = leading_rows(whitened[part], rank, generator, begin)
            metric = self._metric.select(part)
            pair = store_pair(whitened[part], rows[part, :rank], metric, self._recipe.factor_bits, self._dtype)
            pairs.append(pad_pair(pair, self._rows))
        return rows, join_pairs(pairs)

    def advance(self, path: _Path, step: int, trial: bool = False) -> _Path:
        """Return the path after round ``step``: a new compensator for the base, and a new base for that.

        The last round and a ``trial`` of what it would give take the plain step.
        """
        target, error = path.rest, self._work[0]
        _error_into(target, path.base, error)
        plain_step = trial or path.best is None or step == self._recipe.max_rounds - 1
        relaxation = 1.0 if plain_step else RELAXATION
        # C + relaxation·(error of the base), where C = W - rest
        torch.sub(self._weights, target, out=target).add_(error, alpha=relaxation)
        whitened = self._metric.whiten(target)
        start, pair = self._compensate(whitened, path.start)
        del whitened
        rest = self._subtract(pair, target)
        base = self._base.go_on(rest, path.base, self._work, path.best is None, self._feeds_back(step))
        state = State(base, pair, self._metric.cost(_error_into(rest, base, error)))
        return _Path(base, rest, start, state if path.best is None else _better(path.best, state))

    def finish(self, path: _Path, steps: range) -> State:
        """Return the best state after the rounds ``steps``."""
        for step in steps:
            path = self.advance(path, step)
        return path.state

    def with_trial(self, path: _Path) -> _Path:
        """Return the path as it is, but with what a last round would give counted among the states seen."""
        trial = self.advance(replace(path, rest=path.rest.clone()), PROBE_ROUNDS - 1, trial=True)
        return replace(path, best=trial.best)

    def _subtract(self, pair: StoredPair, out: torch.Tensor) -> torch.Tensor:
        """Return W minus the compensator, in ``out``."""
        with fast_products(out.device):
            return torch.baddbmm(self._weights, pair.u.dequantize().mT, pair.v.dequantize(), alpha=-1, out=out)


def _error_into(weights: torch.Tensor, base: GroupQuantized, out: torch.Tensor) -> torch.Tensor:
    """Write ``weights`` minus the base, [B, N, K], into ``out``."""
    groups = out.copy_(base.codes).unflatten(-1, (base.scale.shape[-1], -1))
    groups.sub_(base.zero.float().unsqueeze(-1)).mul_(base.scale.float().unsqueeze(-1))
    return torch.sub(weights, out, out=out)


def _merge(a: _Path, b: _Path, take: torch.Tensor) -> _Path:
    """Return ``b`` where ``take`` [B], else ``a``, but the best state of both; overwrites ``a.rest``."""
    if a.start is None or b.start is None:
        raise ValueError("paths are merged after a round")
    keep = take[:, None, None]
    rest = torch.where(keep, b.rest, a.rest, out=a.rest)
    best = _better(a.state, b.state)
    return _Path(choose_base(a.base, b.base, take), rest, torch.where(keep, b.start, a.start), best)


def _select(path: _Path, index: torch.Tensor) -> _Path:
    """Return the path of the matrices ``index`` of the batch."""
    start = None if path.start is None else path.start[index]
    return _Path(select_base(path.base, index), path.rest[index], start, select_state(path.state, index))


def _better(old: State, new: State) -> State:
    """Return the cheaper state of each matrix."""
    return choose_state(old, new, new.cost < old.cost)
