"""A calibration text without data: what the model itself writes.

Sampled at temperature 1, a language model's own text has nearly the statistics of what it was trained on, and its
activations on it are those of use. transformers does the sampling.
"""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm

from ..errors import ConversionError

OWN_TEXT = "self"
"""Value of ``--calibration`` that asks for this."""
BATCH = 16
"""Windows that are written at once; more need more memory for keys and values."""


@torch.inference_mode()
def write_windows(model: Any, number: int, length: int, seed: int = 0, progress: bool = False) -> torch.Tensor:
    """Return ``number`` windows of token ids [number, length] that the model writes from its first token on.

    A model without a first token begins after its end token, and one without either at a random token. The end
    token is never drawn, so that windows are full.

    Args:
        model: a causal LM of transformers, in evaluation mode.
        number: of windows.
        length: tokens of a window.
        seed: of the sampling; the generators' states are put back.
        progress: show a progress bar.

    Raises:
        ConversionError: fewer than one window is asked for, or the model's probabilities are not finite.
    """
    if number < 1:
        raise ConversionError("--calibration-windows must be at least 1")
    batches = []
    devices = [model.device] if model.device.type == "cuda" else []
    starts = range(0, number, BATCH)
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for start in tqdm(starts, desc="write", unit="batch", disable=not progress):
            first = _first_tokens(model, min(BATCH, number - start))
            batches.append(_continue(model, first, length))
    return torch.cat(batches).cpu()


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
