"""Group-wise asymmetric 3-bit quantizers of one interface: weights in, codes, scales and zero points out.

All work on batches: leading dimensions are independent matrices (the experts of a layer, say). Codes are
always chosen against the fp16 scale and zero point that are stored.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_milo.kernels.packing import MAX_CODE

from .errors import ConversionError

MIN_SCALE = 2.0**-14
"""The smallest normal fp16. Smaller groups are stored with this scale where that loses nothing that counts."""
MAX_SCALE = 65504.0

HQQ_NORM = 0.7  # p of the paper's l_p norm, and of HQQ's defaults
HQQ_BETA = 10.0
HQQ_KAPPA = 1.01
HQQ_ROUNDS = 20


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
    return _encode(groups, scale, zero)


def quantize_hqq(weights: torch.Tensor, group_size: int) -> GroupQuantized:
    """HQQ: the scale of :func:`quantize_rtn`, and the zero point that the half-quadratic solver finds.

    Minimizes the l_p norm, p = 0.7, of the error over z alone (the paper's eq. 4-9, HQQ's constants):
    alternates the shrinkage of the error with the mean that is optimal for it, and stops a matrix when its
    mean absolute error no longer falls.

    Args:
        weights: float32 [..., N, K].
        group_size: consecutive weights of a row that share one scale and zero point; divides K.

    Raises:
        ScaleError: a group's range does not fit fp16.
    """
    groups = weights.unflatten(-1, (-1, group_size))
    scale, zero = min_max(groups)
    constant = groups.amax(-1) == groups.amin(-1)
    step = scale.float().unsqueeze(-1)
    scaled = groups / step
    scaled_mean = scaled.mean(-1)
    current, best_zero = zero.float(), zero.float()
    best_error = torch.full(groups.shape[:-3], torch.inf, device=groups.device)
    codes, residual, size = (torch.empty_like(groups) for _ in range(3))
    beta = HQQ_BETA
    for _ in range(HQQ_ROUNDS):
        torch.add(scaled, current.unsqueeze(-1), out=codes).round_().clamp_(0, MAX_CODE)
        torch.sub(scaled, codes, out=residual).add_(current.unsqueeze(-1)).mul_(step)
        torch.abs(residual, out=size)
        error = size.mean(dim=(-3, -2, -1))
        improved = error < best_error
        if not improved.any():
            break
        best_error = torch.where(improved, error, best_error)
        best_zero = torch.where(improved[..., None, None], current, best_zero)
        shrunk = _shrink(residual, size, beta)
        # the mean of q - (w - m)/s over a group, m the shrunk error: the zero point that is optimal for it
        update = codes.mean(-1) - scaled_mean + shrunk.div_(step).mean(-1)
        current = torch.where(improved[..., None, None] & ~constant, update, current)
        beta *= HQQ_KAPPA
    return _encode(groups, scale, _fit_zero(best_zero))


def refuse_bad_scales(weights: torch.Tensor, group_size: int) -> None:
    """Raise ScaleError where a group of ``weights`` [..., N, K] cannot be stored with an fp16 scale."""
    min_max(weights.unflatten(-1, (-1, group_size)))


def min_max(groups: torch.Tensor, strict: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Return fp16 scale and zero point from the range of each group [..., G, g].

    ``strict`` refuses matrices that the smallest normal scale would lose a visible part of.
    """
    low, high = groups.amin(-1), groups.amax(-1)
    largest = torch.maximum(low.abs(), high.abs())
    constant = low == high
    scale = torch.where(constant, largest, (high - low) / MAX_CODE)
    scale = torch.where(largest == 0, torch.ones_like(scale), scale)
    _refuse_large_scales(scale)
    # An fp16 zero point has 11 bits, so it cannot address a grid finer than 1/2048 of the largest weight.
    scale = torch.maximum(scale, largest / 2048)
    if strict:
        _refuse_lossy_floor(scale, groups)
    stored = scale.clamp(MIN_SCALE, MAX_SCALE).half()
    zero = torch.where(constant, (low < 0).float(), -low / stored.float())
    # a constant too small for a normal scale is held by a fractional zero point instead
    tiny = constant & (largest > 0) & (scale < MIN_SCALE)
    zero = torch.where(tiny, -low / MIN_SCALE, zero)
    return stored, _fit_zero(zero)


def _refuse_large_scales(scale: torch.Tensor) -> None:
    bad = scale > MAX_SCALE
    if bad.any():
        *_, row, group = _first(bad)
        raise ScaleError(
            f"group {group} of row {row} needs scale {scale[bad][0].item():.4g}, above fp16's {MAX_SCALE:.0f}; "
            f"rescale the weights or keep this layer unquantized (--ignore)"
        )


def _refuse_lossy_floor(scale: torch.Tensor, groups: torch.Tensor) -> None:
    """Refuse scales below fp16's normal range where the floor would lose a visible part of the matrix."""
    small = (scale < MIN_SCALE) & (groups.abs().amax(-1) > 0)
    if not small.any():
        return
    rms = groups.square().mean(dim=(-3, -2, -1)).sqrt()
    bad = small & (rms < 8 * MIN_SCALE)[..., None, None]
    if bad.any():
        *_, row, group = _first(bad)
        raise ScaleError(
            f"group {group} of row {row} needs scale {scale[bad][0].item():.3g}, below fp16's smallest normal "
            f"{MIN_SCALE:.3g}, and the whole matrix is that small; rescale it or keep it unquantized (--ignore)"
        )


def _first(mask: torch.Tensor) -> list[int]:
    return [int(i) for i in mask.nonzero()[0]]


def _fit_zero(zero: torch.Tensor) -> torch.Tensor:
    return zero.clamp(-MAX_SCALE, MAX_SCALE).half()


def _codes(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return (groups / scale.float().unsqueeze(-1) + zero.float().unsqueeze(-1)).round_().clamp_(0, MAX_CODE)


def _encode(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> GroupQuantized:
    return GroupQuantized(_codes(groups, scale, zero).to(torch.uint8).flatten(-2), scale, zero)


def _groups(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return values.unflatten(-1, (scale.shape[-1], -1))


def _dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return scale.float().unsqueeze(-1) * (codes - zero.float().unsqueeze(-1))


def _shrink(residual: torch.Tensor, size: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the generalized soft threshold sign(x)·max(|x| - |x|^(p-1)/β, 0) (paper eq. 7).

    Overwrites ``size``, which holds |x|; where x is 0 the power is infinite and the result 0.
    """
    threshold = size.pow(HQQ_NORM - 1).div_(beta)
    return size.sub_(threshold).clamp_(min=0).copysign_(residual)
