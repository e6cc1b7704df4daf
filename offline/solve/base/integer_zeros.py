"""Zero points that are integers from 0 to 7, as the formats of other tools want them."""

from __future__ import annotations

import torch

from vllm_milo.kernels.packing import MAX_CODE

from .group import GroupQuantized, encode, min_max


def with_integer_zeros(weights: torch.Tensor, base: GroupQuantized) -> GroupQuantized:
    """Return a quantization whose zero points are integers from 0 to 7.

    Each group takes what leaves the least squared error: its own scale with the zero point rounded down or up, or the
    grid over its range with 0 in it, which holds groups whose weights all lie far on one side of 0.

    Args:
        weights: float32 [..., N, K], on GPUs [B, N, K].
        base: the quantization with real zero points.

    Raises:
        ScaleError: a group's range does not fit fp16.
    """
    groups = weights.unflatten(-1, (base.scale.shape[-1], -1))
    widened = torch.cat([groups, torch.zeros_like(groups[..., :1])], -1)
    grids = [
        (base.scale, base.zero.floor()),
        (base.scale, base.zero.ceil()),
        min_max(widened),
    ]
    best, least = base, torch.full_like(base.scale, torch.inf, dtype=torch.float32)
    for scale, zero in grids:
        tried = encode(weights, scale, zero.round().clamp(0, MAX_CODE))
        errors = (tried.dequantize() - weights).square().unflatten(-1, (scale.shape[-1], -1)).sum(-1)
        best, least = _take(errors < least, tried, best), torch.minimum(errors, least)
    return best


def _take(where: torch.Tensor, these: GroupQuantized, others: GroupQuantized) -> GroupQuantized:
    """Return the groups of ``these`` where a mask [..., N, G] holds, else those of ``others``."""
    size = these.codes.shape[-1] // where.shape[-1]
    codes = torch.where(where.repeat_interleave(size, -1), these.codes, others.codes)
    pairs = ((these.scale, others.scale), (these.zero, others.zero))
    return GroupQuantized(codes, *(torch.where(where, new, old) for new, old in pairs))
