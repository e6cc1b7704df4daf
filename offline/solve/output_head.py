"""Symmetric integers for the output head: the scale of each group, and the nearest integers on it.

Scales have eight significant bits at most, so that fp16, bf16 and float32 hold them alike: a GEMM that takes scales in
the model's dtype would else change all logits of a token by one factor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..errors import ConversionError
from .base.group import MAX_SCALE

WEIGHTS_AT_ONCE = 2**25
"""A head is never in float32 as a whole: that of a large model has a billion weights."""
_STEPS = {4: [0.70 + 0.05 * step for step in range(11)], 8: [0.90 + 0.02 * step for step in range(7)]}
"""By bits: multiples of the scale that puts a group's extreme on the lowest integer, of which the best is taken. Beyond
1 an extreme of the other sign fits too; below, it is clipped and all else is finer."""


def quantize_head(
    weight: torch.Tensor, bits: int, groups: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield integers and scales of a head's rows, some rows after another, each with the least squared error found.

    Args:
        weight: [V, H], any floating dtype, finite, where it lies.
        bits: 8 or 4.
        groups: of each row, which share a scale; divides H.
        device: where the arithmetic runs.

    Yields:
        Integers int8 [R, H] and scales fp16 [R, groups], on ``device``; the scales may be negative.

    Raises:
        ConversionError: a scale does not fit fp16.
    """
    for rows in weight.split(max(1, WEIGHTS_AT_ONCE // weight.shape[1])):
        yield _quantize_rows(rows.to(device).float(), bits, groups)


def _quantize_rows(rows: torch.Tensor, bits: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    held = rows.unflatten(-1, (groups, -1))
    extreme = held.gather(-1, held.abs().argmax(-1, keepdim=True))
    lowest = -(2 ** (bits - 1))
    if float(extreme.abs().max()) > -lowest * MAX_SCALE:
        raise ConversionError(
            f"the output head has weights up to {float(extreme.abs().max()):g}, whose scales fp16 cannot hold; convert "
            f"the model with --lm-head-bits 16"
        )
    best = torch.full_like(extreme, torch.inf)
    scale = torch.ones_like(extreme)
    for step in _STEPS[bits]:
        scale, best = _better(held, bits, _stored(extreme * (step / lowest)), scale, best)
    values = _nearest(held, scale, bits)
    refit = (held * values).sum(-1, keepdim=True) / values.square().sum(-1, keepdim=True).clamp_min(1)
    scale, _ = _better(held, bits, _stored(refit), scale, best)
    return _nearest(held, scale, bits).to(torch.int8).flatten(-2), scale.squeeze(-1).half()


def _better(
    held: torch.Tensor, bits: int, candidate: torch.Tensor, scale: torch.Tensor, best: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each group the scale with the smaller squared error, and that error."""
    error = (held - candidate * _nearest(held, candidate, bits)).square().sum(-1, keepdim=True)
    better = error < best
    return torch.where(better, candidate, scale), torch.where(better, error, best)


def _nearest(held: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the nearest integers, as float32."""
    return (held / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _stored(scale: torch.Tensor) -> torch.Tensor:
    """Return scales as they are stored; 1 where they would be 0, and the group with them."""
    found = scale.bfloat16().half().float()
    return torch.where(found == 0, 1.0, found)
