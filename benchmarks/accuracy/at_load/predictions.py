"""Predictions of a model's likeliest tokens at each position of a text, and how far two models' are apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

LEAST = 1e-9
"""A probability of all other tokens together below this is what rounding has left of none."""


class Predictions(NamedTuple):
    """What a model predicts of P tokens, each from those before it.

    Attributes:
        ids: tokens whose log-probabilities are known, int32 [P, K], the likeliest first; -1 fills rows that have fewer.
        logprobs: theirs, nats, float32 [P, K], exact; -inf where there is no token.
        actual: of the token that follows, nats, float32 [P].
    """

    ids: torch.Tensor
    logprobs: torch.Tensor
    actual: torch.Tensor

    @classmethod
    def of(cls, tables: Sequence[Mapping[int, float]], tokens: Sequence[int], top: int) -> Predictions:
        """Return predictions from log-probabilities by token id.

        Args:
            tables: of each position the ``top`` likeliest tokens and the one that follows, or as many as there are.
            tokens: ids of the tokens that follow.
            top: number of likeliest tokens.

        Raises:
            ValueError: a log-probability is not finite, or a token that follows has none.
        """
        ids = torch.full((len(tables), top + 1), -1, dtype=torch.int32)
        logprobs = torch.full((len(tables), top + 1), -math.inf)
        for row, (table, token) in enumerate(zip(tables, tokens, strict=True)):
            if token not in table:
                raise ValueError(f"position {row}: the token that follows, {token}, has no log-probability")
            # among equals the smaller id, whatever order an engine gives them in
            known = sorted(table.items(), key=lambda pair: (-pair[1], pair[0]))
            ids[row, : len(known)] = torch.tensor([token for token, _ in known], dtype=torch.int32)
            logprobs[row, : len(known)] = torch.tensor([value for _, value in known])
        if not torch.isfinite(logprobs[ids >= 0]).all():
            raise ValueError("log-probabilities are not finite")
        return cls(ids, logprobs, torch.tensor([table[token] for table, token in zip(tables, tokens, strict=True)]))

    @classmethod
    def read(cls, path: Path) -> Predictions:
        """Read a file of :meth:`write`."""
        return cls(**load_file(path))

    def write(self, path: Path) -> None:
        """Write a safetensors file."""
        save_file({name: tensor.contiguous() for name, tensor in self._asdict().items()}, path)

    def part(self, start: int, stop: int) -> Predictions:
        """Return the positions from ``start`` to before ``stop``."""
        return Predictions(*(tensor[start:stop] for tensor in self))

    @property
    def perplexity(self) -> float:
        """Exponential of the mean loss of the tokens that follow."""
        return math.exp(-float(self.actual.double().mean()))


class Distance(NamedTuple):
    """How far a model's predictions are from a reference's, means over positions.

    Attributes:
        kl: KL divergence, nats, of distributions in which all tokens without a log-probability in either are one: at
            most that over the whole vocabulary, which it is where all tokens are known.
        known: the reference's probability of the tokens that are not in that one.
        top1: share of the positions at which both find the same token the likeliest.
    """

    kl: float
    known: float
    top1: float


def distance(model: Predictions, reference: Predictions) -> Distance:
    """Return how far a model's predictions are from a reference's of the same text.

    Raises:
        ValueError: they are of different numbers of tokens.
    """
    if len(model.ids) != len(reference.ids):
        raise ValueError(f"{len(model.ids)} and {len(reference.ids)} positions are not of one text")
    found = [_row(*row) for row in zip(reference.ids, reference.logprobs, model.ids, model.logprobs, strict=True)]
    kl, known = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
    return Distance(kl, known, float((model.ids[:, 0] == reference.ids[:, 0]).double().mean()))


def _row(
    ids: torch.Tensor, logprobs: torch.Tensor, other_ids: torch.Tensor, other_logprobs: torch.Tensor
) -> tuple[float, float]:
    """Return a position's KL divergence, and the reference's probability of what both know."""
    others, order = other_ids.sort()
    place = torch.searchsorted(others, ids).clamp_max(len(others) - 1)
    common = (others[place] == ids) & (ids >= 0)
    mine, theirs = logprobs[common].double(), other_logprobs[order[place]][common].double()
    known = float(mine.exp().sum())
    rest = [max(1 - known, LEAST), max(1 - float(theirs.exp().sum()), LEAST)]
    return float((mine.exp() * (mine - theirs)).sum()) + rest[0] * math.log(rest[0] / rest[1]), known
