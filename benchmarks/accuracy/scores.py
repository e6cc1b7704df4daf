"""Statistics of the accuracy benchmark: window losses, perplexities over seeds, gap closed, the paper's share.

A seed is one set of text windows; the sets are disjoint, and every method is scored on the same ones, so that
differences between methods are paired.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch


class Spread(NamedTuple):
    """A mean over seeds and the standard deviation between them (0 for a single seed)."""

    mean: float
    spread: float


class Difference(NamedTuple):
    """A mean paired difference of losses in nats a token, and its standard error over windows."""

    mean: float
    error: float


class Share(NamedTuple):
    """The largest share of the gap that any policy closes at some bits, for each seed, and that policy."""

    by_seed: list[float]
    policy: str


Curve = Sequence[tuple[float, Sequence[float]]]
"""Points of one policy: stored bits a weight, gap closed for each seed."""


def choose_windows(tokens: torch.Tensor, window: int, count: int, seeds: int, seed: int = 0) -> torch.Tensor:
    """Return ``seeds`` disjoint random sets of windows that do not overlap, int64 [seeds, count, window].

    Args:
        tokens: int64 [tokens].
        window: tokens of a window.
        count: windows of a set; fewer where the text is short.
        seeds: number of sets.
        seed: of the choice.

    Raises:
        ValueError: the text has not one window for every set.
    """
    available = tokens.numel() // window
    if available < seeds:
        raise ValueError(f"{tokens.numel()} tokens hold {available} windows of {window}; {seeds} sets need more text")
    count = min(count, available // seeds)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[: seeds * count]
    return tokens[: available * window].view(available, window)[order].view(seeds, count, window)


@torch.inference_mode()
def window_losses(model: Any, windows: torch.Tensor, batch: int) -> torch.Tensor:
    """Return the mean loss of each window in nats a token, float64 on the CPU, shape of ``windows`` less its last."""
    flat = windows.flatten(0, -2)
    losses = []
    for ids in flat.split(batch):
        ids = ids.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        losses.append(loss.double().mean(1).cpu())
    return torch.cat(losses).view(windows.shape[:-1])


def perplexities(losses: torch.Tensor) -> list[float]:
    """Return the perplexity of each seed from window losses [seeds, windows]."""
    return [math.exp(value) for value in losses.mean(1).tolist()]


def spread(values: Sequence[float]) -> Spread:
    """Return mean and sample standard deviation."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return Spread(mean, 0.0)
    return Spread(mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)))


def gap_closed(found: Sequence[float], hqq: Sequence[float], best: Sequence[float]) -> list[float]:
    """Return the share of HQQ's distance to bf16 in perplexity that a method removes, for each seed."""
    return [(h - value) / (h - b) for value, h, b in zip(found, hqq, best, strict=True)]


def paired_difference(losses: torch.Tensor, reference: torch.Tensor) -> Difference:
    """Return by how much ``losses`` exceed ``reference`` on the same windows; negative is better."""
    differences = (losses - reference).flatten()
    error = float(differences.std() / math.sqrt(differences.numel())) if differences.numel() > 1 else 0.0
    return Difference(float(differences.mean()), error)


def interpolate(curve: Curve, bits: float) -> list[float] | None:
    """Return the gap closed at ``bits`` for each seed, linear between neighbours; None outside the curve."""
    points = sorted(curve)
    for (low, before), (high, after) in itertools.pairwise(points):
        if low <= bits <= high:
            weight = 0.0 if high == low else (bits - low) / (high - low)
            return [(1 - weight) * x + weight * y for x, y in zip(before, after, strict=True)]
    return None


def paper_share(curves: Mapping[str, Curve], bits: float) -> Share | None:
    """Return P: what the paper's method closes of the gap at ``bits``, by the policy that is best on average.

    Args:
        curves: for each policy its points; the point without compensators (HQQ) should be among them.
        bits: stored bits a weight.

    Returns:
        None where no policy has points on both sides of ``bits``.
    """
    found = {policy: interpolate(curve, bits) for policy, curve in curves.items()}
    shares = [Share(values, policy) for policy, values in found.items() if values is not None]
    return max(shares, key=lambda share: sum(share.by_seed), default=None)
