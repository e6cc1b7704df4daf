"""Windows of a calibration text: equally long pieces, spread evenly over it."""

from __future__ import annotations

import torch

from ..errors import ConversionError

WINDOW = 512
"""Tokens of a window of :func:`spread_windows`."""


def spread_windows(tokens: torch.Tensor, number: int, length: int = WINDOW) -> torch.Tensor:
    """Return ``number`` windows [number, length], evenly spread over a text's token ids, as many as it holds.

    Raises:
        ConversionError: the text is shorter than one window, or the number not positive.
    """
    if number < 1:
        raise ConversionError("--calibration-windows must be at least 1")
    whole = tokens.numel() // length
    if whole == 0:
        raise ConversionError(f"the calibration text has {tokens.numel()} tokens; it needs at least {length}")
    number = min(number, whole)
    starts = [index * whole // number * length for index in range(number)]
    return torch.stack([tokens[start : start + length] for start in starts])
