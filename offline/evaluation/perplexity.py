"""Perplexity by the paper's protocol."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from ..errors import ConversionError
from ..progress import progress_bar

WINDOW = 2048
STRIDE = 512
PROTOCOL = "window {window}, stride {stride}, mean of per-window losses over tokens not scored before"


class Perplexity(NamedTuple):
    """A perplexity and how it was measured."""

    perplexity: float
    windows: int
    tokens: int
    protocol: str


def perplexity(
    model: Any,
    tokens: torch.Tensor,
    max_windows: int | None = None,
    window: int = WINDOW,
    stride: int | None = None,
    progress: bool = False,
) -> Perplexity:
    """Return the perplexity of a model on token ids, by the paper's protocol.

    Windows of 2048 tokens (or the model's maximum) start every 512; each scores only the tokens that no
    window before it scored, and counts once in the mean.

    Args:
        model: a causal LM of transformers.
        tokens: int64 [tokens].
        max_windows: stop after so many windows.
        window: tokens of a window, at most; the model's maximum caps it.
        stride: tokens between the starts of windows; None for 512, or a window where that is less.
        progress: show a progress bar.

    Raises:
        ConversionError: fewer than two tokens, or a number of windows, a window or a stride that scores nothing.
    """
    if max_windows is not None and max_windows < 1:
        raise ConversionError(f"--max-windows {max_windows}: must be at least 1")
    window = min(window, int(model.config.get_text_config().max_position_embeddings))
    stride = min(STRIDE, window) if stride is None else stride
    if tokens.numel() < 2:
        raise ConversionError("the text has fewer than two tokens; nothing to score")
    if window < 2 or not 0 < stride <= window:
        raise ConversionError(f"window {window} and stride {stride}: need window > 1 and 0 < stride <= window")
    starts = list(range(0, max(1, tokens.numel() - 1), stride))
    losses: list[float] = []
    scored_to = 0
    for start in progress_bar(starts[:max_windows], "perplexity", progress, unit="window"):
        end = min(start + window, tokens.numel())
        new = end - max(scored_to, start + 1)
        if new <= 0:
            break
        losses.append(_window_loss(model, tokens[start:end], new))
        scored_to = end
    protocol = PROTOCOL.format(window=window, stride=stride)
    return Perplexity(math.exp(sum(losses) / len(losses)), len(losses), scored_to, protocol)


@torch.inference_mode()
def _window_loss(model: Any, window: torch.Tensor, new: int) -> float:
    ids = window.to(model.device).unsqueeze(0)
    logits = model(input_ids=ids, use_cache=False).logits[0, -new - 1 : -1].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, -new:]))
