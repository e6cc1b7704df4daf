"""Trains the quantized state of a whole model on the original model's predictions.

The loss is the KL divergence from the original's distribution of the next token, the mean over all tokens. It needs
both models in memory. What it gains over training layer by layer are errors that add up and that no layer sees by
itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..families.family import Family
from ..nouns import Matrix
from ..progress import progress_bar
from ..solve.methods import Solved
from .groups import Paces, Place, make_groups, step_groups
from .latents import Rates
from .repeat import Repeat
from .repeatable import repeatable


@dataclass(frozen=True)
class TuneOptions:
    """How a whole model is trained.

    Attributes:
        steps: of Adam.
        batch: windows of a step.
        seed: of the choice of windows.
        rates: learning rates. On real weights of 0.5 B parameters, three passes over 2 million tokens: codes and
            factors at 1e-3 leave a KL divergence of 0.0475, at 5e-4 0.0491 (and so does one pass); at 2e-3, 0.6 of a
            pass, codes flip faster than they settle, 0.0561 (2026-11-28).
    """

    steps: int = 200
    batch: int = 4
    seed: int = 0
    rates: Rates = field(default_factory=lambda: Rates(codes=1e-3, scale=3e-4, zero=1.5e-3, factors=1e-3))


class TuneReport(NamedTuple):
    """The mean KL divergence, nats a token, over the first and the last tenth of the steps."""

    first: float
    last: float


def tune(
    model: Any,
    original: Any,
    place: Place,
    family: Family,
    solved: Mapping[Matrix, Solved],
    windows: torch.Tensor,
    bits: int,
    options: TuneOptions,
    progress: bool = False,
) -> tuple[dict[Matrix, Solved], TuneReport]:
    """Train all matrices of a model together.

    Args:
        model: a causal LM of transformers with the original weights, which are overwritten.
        original: the same model, which stays as it is.
        place: of a tensor in the model's parameters.
        family: of the model.
        solved: the quantized matrices.
        windows: token ids, int64 [W, T].
        bits: of the factors.
        options: steps, windows, rates.
        progress: show how far it is.
    """
    parameters = {family.checkpoint_name(name): parameter for name, parameter in model.named_parameters()}
    groups = make_groups(place, parameters, solved, {}, bits)
    for group in groups:
        group.write()
    generator = torch.Generator().manual_seed(options.seed)
    device = model.device
    ids = torch.empty(options.batch, windows.shape[1], dtype=torch.int64, device=device)
    value, paces = torch.zeros((), device=device), Paces(groups)

    def body() -> None:
        with repeatable(device):
            value.copy_(step_groups(groups, lambda: prediction_divergence(model, original, ids), options.rates, paces))

    step = Repeat(body, device)
    losses: list[torch.Tensor] = []
    order = torch.randperm(len(windows), generator=generator)
    for number in progress_bar(range(options.steps), "tune", progress, unit="step"):
        if len(order) < options.batch:
            order = torch.randperm(len(windows), generator=generator)
        ids.copy_(windows[order[: options.batch]])
        order = order[options.batch :]
        paces.set(number, options.steps)
        step()
        losses.append(value.clone())
    tenth = max(1, len(losses) // 10)
    first, last = (float(torch.stack(part).mean()) for part in (losses[:tenth], losses[-tenth:]))
    return {matrix: one for group in groups for matrix, one in group.stored().items()}, TuneReport(first, last)


def prediction_divergence(model: Any, original: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean KL divergence of a model's predictions from the original's, nats a token.

    Args:
        model: a causal LM of transformers; the result can be differentiated by its weights.
        original: what it is compared with.
        ids: token ids, int64 [W, T]; float32 copies are made of one window's predictions at a time.
    """
    with torch.no_grad():
        wanted = original(ids, use_cache=False).logits
    logits = model(ids, use_cache=False).logits
    total = logits.new_zeros((), dtype=torch.float32)
    for mine, theirs in zip(logits, wanted, strict=True):
        total = total + _window_divergence(mine, theirs)
    return total / len(ids)


def _window_divergence(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    target, found = wanted.float().log_softmax(-1), logits.float().log_softmax(-1)
    return (target.exp() * (target - found)).sum(-1).mean()
