"""HQQ with a choice of scales: what the joint loop quantizes by where nothing is known of a matrix's inputs.

HQQ keeps the whole range of a group. Under a compensator, which can hold the few weights that a smaller range cuts
off, some groups are better with less of it. On the weights of Qwen2.5-Coder-0.5B as a Qwen2-MoE at 3.61 bits, 6
rounds, share of HQQ g64's KL divergence that is closed (2026-11-27): the whole range 0.444; that or 0.9 of it
**0.488**; or 0.96 of it 0.483; or 0.94 or 0.88 0.492; or 0.92 or 0.85 0.459; always 0.92 0.457; six shares from 1.05
to 0.8 0.336; four down to 0.7 0.110. **Without a compensator a choice is worse** (groups of 128, KL 0.469 with the
whole range, 0.504 to 0.522 with a choice). HQQ's shrinkage is no help in its own scale: with β in steps of the grid
0.428 to 0.440 (the whole range).
"""

from __future__ import annotations

import torch

from .group import MIN_SCALE, GroupQuantized, encode, fit_zero, min_max
from .hqq import NORM, fit_zeros

SHARES = (1.0, 0.9)
"""Of a group's range: what a scale may span."""
_MIDDLE = 3.5
"""The middle of the codes."""


def quantize_robustly(weights: torch.Tensor, group_size: int) -> GroupQuantized:
    """Quantize by HQQ with that share of each group's range which leaves the smaller error in HQQ's norm.

    Args:
        weights: float32 [..., N, K]; on GPUs [B, N, K].
        group_size: consecutive weights of a row that share one scale and zero point; divides K.

    Raises:
        ScaleError: a group's range does not fit fp16.
    """
    groups = weights.unflatten(-1, (-1, group_size))
    whole, zero = min_max(groups)
    best_scale, best_zero = whole, fit_zeros(weights, whole, zero)
    best = _error(weights, best_scale, best_zero)
    middle = (groups.amax(-1) + groups.amin(-1)) / 2
    for share in SHARES[1:]:
        scale = (whole.float() * share).clamp_(min=MIN_SCALE).half()
        found = fit_zeros(weights, scale, fit_zero(_MIDDLE - middle / scale.float()))
        error = _error(weights, scale, found)
        better = error < best
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, found, best_zero)
        best = torch.minimum(error, best)
    return encode(weights, best_scale, best_zero)


def _error(weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Return Σ|w - ŵ|^p of each group, float32 [..., N, G], p HQQ's."""
    if weights.is_cuda:
        from vllm_milo.kernels.convert import grid_fit

        return grid_fit.power_sums(weights, scale, zero, NORM)
    error = weights - encode(weights, scale, zero).dequantize()
    return error.abs_().pow_(NORM).unflatten(-1, (scale.shape[-1], -1)).sum(-1)
