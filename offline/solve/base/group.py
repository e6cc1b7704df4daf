"""Group-wise asymmetric 3-bit quantization: codes, scales and zero points of groups of weights, and round-to-nearest.

All quantizers of this folder have one interface and work on batches: leading dimensions are independent matrices (the
experts of a layer, say). Codes are always chosen against the fp16 scale and zero point that are stored.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_milo.kernels.packing import MAX_CODE

from ...errors import ConversionError

SMALLEST_NORMAL = 2.0**-14
"""Of fp16. Scales below it have fewer bits: as a multiple of :data:`MIN_SCALE` they are exact within half of that."""
MIN_SCALE = 2.0**-24
"""The smallest fp16 above 0. Smaller groups are stored with this scale, which is off by at most half of it a weight."""
MAX_SCALE = 65504.0


class GroupQuantized(NamedTuple):
    """A quantized batch of matrices: codes uint8 [..., N, K]; scale, zero fp16 [..., N, K/g]."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """Return s·(q - z) in float32, [..., N, K]."""
        return _dequantize(_groups(self.codes, self.scale).float(), self.scale, self.zero).flatten(-2)


class ScaleError(ConversionError):
    """A group's scale or zero point does not fit fp16."""


def quantize_rtn(weights: torch.Tensor, group_size: int) -> GroupQuantized:
    """Round to nearest: s = (max - min)/7 and z = -min/s of each group.

    Args:
        weights: float32 [..., N, K].
        group_size: consecutive weights of a row that share one scale and zero point; divides K.

    Raises:
        ScaleError: a group's range does not fit fp16.
    """
    groups = weights.unflatten(-1, (-1, group_size))
    scale, zero = min_max(groups)
    return encode(weights, scale, zero)


def encode(weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> GroupQuantized:
    """Return the nearest codes of weights [..., N, K], on GPUs [B, N, K], on a stored grid fp16 [..., N, K/g]."""
    if weights.is_cuda:
        from vllm_milo.kernels.convert import grid_fit

        return GroupQuantized(grid_fit.nearest_codes(weights, scale, zero), scale, zero)
    steps = _groups(weights, scale) / scale.float().unsqueeze(-1) + zero.float().unsqueeze(-1)
    return GroupQuantized(steps.round_().clamp_(0, MAX_CODE).to(torch.uint8).flatten(-2), scale, zero)


def refuse_bad_scales(weights: torch.Tensor, group_size: int) -> None:
    """Raise ScaleError where a group of ``weights`` [..., N, K] needs a scale above fp16's largest."""
    min_max(weights.unflatten(-1, (-1, group_size)))


def min_max(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return fp16 scale and zero point from the range of each group [..., G, g].

    Raises:
        ScaleError: a scale is above fp16's largest.
    """
    low, high = groups.amin(-1), groups.amax(-1)
    largest = torch.maximum(low.abs(), high.abs())
    constant = low == high
    scale = torch.where(constant, largest, (high - low) / MAX_CODE)
    scale = torch.where(largest == 0, torch.ones_like(scale), scale)
    _refuse_large_scales(scale)
    # An fp16 zero point has 11 bits, so it cannot address a grid finer than 1/2048 of the largest weight.
    scale = torch.maximum(scale, largest / 2048)
    stored = scale.clamp(MIN_SCALE, MAX_SCALE).half()
    zero = torch.where(constant, (low < 0).float(), -low / stored.float())
    # a constant too small for a normal scale is held by a fractional zero point instead, which has more bits
    tiny = constant & (largest > 0) & (scale < SMALLEST_NORMAL)
    stored = torch.where(tiny, torch.full_like(stored, SMALLEST_NORMAL), stored)
    zero = torch.where(tiny, -low / SMALLEST_NORMAL, zero)
    # and a group that does not fill one step of the smallest scale by its mean
    narrow = ~constant & (high - low < MIN_SCALE) & (stored == MIN_SCALE)
    if narrow.any():
        zero = torch.where(narrow, -groups.mean(-1) / MIN_SCALE, zero)
    return stored, fit_zero(zero)


def _refuse_large_scales(scale: torch.Tensor) -> None:
    bad = scale > MAX_SCALE
    if bad.any():
        *_, row, group = _first(bad)
        raise ScaleError(
            f"group {group} of row {row} needs scale {scale[bad][0].item():.4g}, above fp16's {MAX_SCALE:.0f}; "
            f"rescale the weights or keep this layer unquantized (--ignore)"
        )


def _first(mask: torch.Tensor) -> list[int]:
    return [int(i) for i in mask.nonzero()[0]]


def fit_zero(zero: torch.Tensor) -> torch.Tensor:
    """Return zero points as fp16 holds them."""
    return zero.clamp(-MAX_SCALE, MAX_SCALE).half()


def _groups(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return values.unflatten(-1, (scale.shape[-1], -1))


def _dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return scale.float().unsqueeze(-1) * (codes - zero.float().unsqueeze(-1))
