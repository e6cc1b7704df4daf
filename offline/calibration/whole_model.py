"""Moments from a model in memory as a whole: a forward and a backward pass over the calibration text."""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm

from ..source.families import find_family
from .hooks import watch
from .text_moments import Calibration


def calibrate(model: Any, windows: torch.Tensor, seed: int = 0, progress: bool = False) -> Calibration:
    """Run a model forward and backward over a text and gather the moments of all its linear layers and experts.

    Args:
        model: a causal LM of transformers, in evaluation mode.
        windows: int64 [windows, tokens].
        seed: of the labels that are drawn from the model.
    """
    family = find_family(model.config.to_dict())
    calibration = Calibration()
    generator = torch.Generator(model.device).manual_seed(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    handles = watch(model, family, calibration)
    try:
        for window in tqdm(windows, desc="calibrate", unit="window", disable=not progress):
            _backward(model, window.to(model.device), generator)
            calibration.tokens += window.numel()
    finally:
        for undo in handles:
            undo()
    return calibration


@torch.enable_grad()
def _backward(model: Any, window: torch.Tensor, generator: torch.Generator) -> None:
    embedded = model.get_input_embeddings()(window.unsqueeze(0)).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits[0].float()
    with torch.no_grad():
        labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
