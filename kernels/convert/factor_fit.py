"""The storage of low-rank factors in 3 bits with fitted scales, for the converter on GPUs.

One kernel reads a factor once, where torch reads and writes it two hundred times in as many launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import device_of
from ..sizes import cdiv

GROUP = 64
"""Values of a row that share one scale."""
BLOCK = 16
"""Groups of a program."""


@triton.jit
def _codes(values, scale, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The nearest codes of groups on their scales, as floats."""
    return tl.minimum(tl.maximum(tl.floor(values / scale[:, None] + 0.5), LOW), HIGH)


@triton.jit
def _stored(scale):
    return scale.to(tl.float16).to(tl.float32)


@triton.jit
def _fit(
    values, weight, scale, best, best_error,
    least: tl.constexpr, FITS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """The better of ``best`` and what regressions from a scale go through, with its error."""
    for fit in tl.static_range(FITS):
        codes = _codes(values, scale, LOW, HIGH)
        error = values - codes * scale[:, None]
        cost = tl.sum(error * error * weight, 1)
        better = cost < best_error
        best, best_error = tl.where(better, scale, best), tl.where(better, cost, best_error)
        if fit + 1 < FITS:
            fitted = tl.sum(values * codes * weight, 1) / tl.maximum(tl.sum(codes * codes * weight, 1), 1e-30)
            scale = _stored(tl.where(fitted > least, fitted, scale))
    return best, best_error


@triton.jit
def _store_kernel(
    factor_ptr, weight_ptr, weight_stride, code_ptr, scale_ptr, groups, in_row, in_matrix,
    FIRST: tl.constexpr, SECOND: tl.constexpr, least: tl.constexpr, FITS: tl.constexpr, ZERO: tl.constexpr,
    LAST: tl.constexpr, WEIGHED: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK groups; ``in_row`` groups make a row, ``in_matrix`` a matrix. Ranges begin at FIRST and SECOND."""
    LOW: tl.constexpr = -ZERO
    HIGH: tl.constexpr = LAST - ZERO
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = group < groups
    column = tl.arange(0, GROUP)
    place = group.to(tl.int64)[:, None] * GROUP + column[None, :]
    mask = inside[:, None] & (place >= 0)
    values = tl.load(factor_ptr + place, mask=mask, other=0.0)
    if WEIGHED:
        at = (group // in_matrix).to(tl.int64) * weight_stride + (group % in_row) * GROUP
        weight = tl.load(weight_ptr + at[:, None] + column[None, :], mask=mask, other=0.0)
    else:
        weight = tl.full((BLOCK, GROUP), 1.0, tl.float32)
    largest = tl.max(tl.abs(values), 1)
    first = _stored(tl.maximum(largest * FIRST, least))
    second = _stored(tl.maximum(largest * SECOND, least))
    best, error = first, tl.full((BLOCK,), float("inf"), tl.float32)
    best, error = _fit(values, weight, first, best, error, least, FITS, LOW, HIGH)
    best, error = _fit(values, weight, second, best, error, least, FITS, LOW, HIGH)
    codes = _codes(values, best, LOW, HIGH) + ZERO
    tl.store(code_ptr + place, codes.to(tl.uint8), mask=mask)
    tl.store(scale_ptr + group, best.to(tl.float16), mask=inside)


def store_factor(
    factor: torch.Tensor,
    importance: torch.Tensor | None,
    clips: tuple[float, float],
    fits: int,
    least: float,
    codes: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes uint8 [B, r, C] of a factor and its scales fp16 [B, r, C/64], fitted by least squares.

    Args:
        factor: float32 [B, r, C], C a multiple of 64.
        importance: weights of squared errors, float32 [B, 1, C] or [1, 1, C]; None for equal ones.
        clips: shares of a group's largest value where the fits begin, in steps of the codes.
        fits: scales that are tried from each.
        least: the least scale.
        codes: the one that stands for 0, and the last.
    """
    factor = factor.contiguous()
    batch, rows, columns = factor.shape
    found = torch.empty(factor.shape, dtype=torch.uint8, device=factor.device)
    scale = torch.empty(batch, rows, columns // GROUP, dtype=torch.float16, device=factor.device)
    weighed = importance is not None
    weight = factor if importance is None else importance.contiguous()
    stride = columns if importance is not None and len(importance) > 1 else 0
    groups, in_row = scale.numel(), columns // GROUP
    with device_of(factor):
        _store_kernel[(cdiv(groups, BLOCK),)](
            factor,
            weight,
            stride,
            found,
            scale,
            groups,
            in_row,
            in_row * rows,
            FIRST=clips[0],
            SECOND=clips[1],
            least=least,
            FITS=fits,
            ZERO=codes[0],
            LAST=codes[1],
            WEIGHED=weighed,
            GROUP=GROUP,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return found, scale
