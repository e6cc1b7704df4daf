"""A calibration text without data: what the model itself writes.

Sampled at temperature 1, a language model's own text has nearly the statistics of what it was trained on, and its
activations on it are those of use. transformers does the sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import ConversionError
from ..progress import progress_bar

OWN_TEXT = "self"
"""Value of ``--calibration`` that asks for this."""
BATCH = 256
"""Windows that are written at once; more need more memory for keys and values."""
OPENING_LENGTHS = (8, 32, 96)
"""Tokens of a text that windows begin with, a third of them each: short ones leave the model its own choice of subject,
long ones keep it there."""


@torch.inference_mode()
def write_windows(
    model: Any,
    number: int,
    length: int,
    seed: int = 0,
    progress: bool = False,
    chat: Sequence[int] = (),
    openings: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``number`` windows of token ids [number, length] that the model writes.

    Half of them begin with ``chat``, if given: the chat template up to a user's words. The others go on from some
    words of ``openings``, so that they speak of many things. Without those they begin with the model's first token; a
    model without one begins after its end token, and one without either at a random token. The end token is never
    drawn, so that windows are full.

    Args:
        model: a causal LM of transformers, in evaluation mode.
        number: of windows.
        length: tokens of a window.
        seed: of the sampling; the generators' states are put back.
        progress: show a progress bar.
        chat: token ids that half of the windows begin with.
        openings: windows of a text, int64 [S, T].

    Raises:
        ConversionError: fewer than one window is asked for, or the model's probabilities are not finite.
    """
    if number < 1:
        raise ConversionError("--calibration-windows must be at least 1")
    devices = [model.device] if model.device.type == "cuda" else []
    turns = number // 2 if 0 < len(chat) < length else 0
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        starts = [torch.tensor(chat, device=model.device).expand(turns, -1)] if turns else []
        starts += _cut_openings(model, number - turns, length, openings)
        parts = [part for start in starts for part in start.split(BATCH)]
        bar = progress_bar(parts, "write", progress, unit="part")
        return torch.cat([_continue(model, part, length) for part in bar]).cpu()


def chat_start(tokenizer: Any) -> list[int]:
    """Return the token ids of a chat template up to a user's words; none where there is no template."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    mark = "0123456789"
    text = str(tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False))
    begin, found, _ = text.partition(mark)
    return list(tokenizer(begin, add_special_tokens=False)["input_ids"]) if found else []


def _cut_openings(model: Any, number: int, length: int, openings: torch.Tensor | None) -> list[torch.Tensor]:
    """Return what ``number`` windows begin with, those of one length together, [n, l] each."""
    if openings is None:
        return [_first_tokens(model, number)]
    found = []
    for place, wanted in enumerate(OPENING_LENGTHS):
        own = number // len(OPENING_LENGTHS) + (place < number % len(OPENING_LENGTHS))
        size = min(wanted, length // 2, openings.shape[1])
        window = torch.randint(len(openings), (own, 1))
        first = torch.randint(openings.shape[1] - size + 1, (own, 1))
        found.append(openings[window, first + torch.arange(size)].to(model.device))
    return [start for start in found if len(start)]


def _first_tokens(model: Any, number: int) -> torch.Tensor:
    for token in (model.config.bos_token_id, model.config.eos_token_id):
        if isinstance(token, list):
            token = token[0] if token else None
        if token is not None:
            return torch.full((number, 1), token, device=model.device)
    return torch.randint(model.config.vocab_size, (number, 1), device=model.device)


def _continue(model: Any, first: torch.Tensor, length: int) -> torch.Tensor:
    from transformers import GenerationConfig

    ends = model.config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    plain = GenerationConfig(
        max_length=length,
        min_length=length,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        suppress_tokens=ends or None,
        pad_token_id=0,
    )
    try:
        return model.generate(first, attention_mask=torch.ones_like(first), generation_config=plain)
    except RuntimeError as error:  # what torch.multinomial says of NaN and Inf
        if "probability tensor" not in str(error):
            raise
        raise ConversionError(
            "--calibration self: the model's probabilities are not finite, so it cannot write; pass a text"
        ) from error
