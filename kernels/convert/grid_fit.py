"""The nearest codes of groups on their grids, and what the fits of those grids need, for the converter on GPUs.

Each kernel reads the weights once, where torch reads and writes them a dozen times.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..launch import device_of
from ..packing import MAX_CODE
from ..sizes import cdiv

_ELEMENTS = 4096
"""Weights that a program holds in registers."""
_WARPS = 4


def code_sums(
    weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, share: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return Σ p·q, Σ p·q² and Σ p·q·w over each group, float32 [B, N, G]: q the nearest codes, p the shares.

    Args:
        weights: float32 [B, N, K]; rows may lie further apart than K.
        scale: [B, N, G].
        zero: [B, N, G], real-valued.
        share: of each weight in its group, float32 [B, 1, K] or [1, 1, K], contiguous; None for 1/g.
    """
    sums = [torch.empty(scale.shape, dtype=torch.float32, device=weights.device) for _ in range(3)]
    share_stride = share.stride(0) if share is not None and len(share) > 1 else 0
    shares = weights if share is None else share
    _launch(_sums, weights, scale, zero, shares, share_stride, *sums, WEIGHED=share is not None)
    return sums[0], sums[1], sums[2]


def nearest_codes(weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Return the nearest codes, uint8 [B, N, K], of weights as :func:`code_sums` takes them."""
    codes = torch.empty(weights.shape, dtype=torch.uint8, device=weights.device)
    _launch(_codes, weights, scale, zero, codes)
    return codes


def half_quadratic_step(
    weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, beta: float, norm: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a round of HQQ needs of each group, float32 [B, N, G]: Σ|w - ŵ| and the next zero point.

    That is the mean of q - (w - m)/s (paper eq. 8 and 9). m is the error, shrunk by
    sign(x)·max(|x| - |x|^(p-1)/β, 0) (eq. 7).

    Args:
        weights: as in :func:`code_sums`.
        scale: [B, N, G].
        zero: [B, N, G], real-valued.
        beta: β.
        norm: p, below 1.
    """
    size, update = (torch.empty(scale.shape, dtype=torch.float32, device=weights.device) for _ in range(2))
    _launch(_half_quadratic, weights, scale, zero, beta, norm - 1, size, update)
    return size, update


def power_sums(weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, norm: float) -> torch.Tensor:
    """Return Σ|w - ŵ|^p over each group, float32 [B, N, G], ŵ the nearest on the grid; arguments as of the others."""
    sums = torch.empty(scale.shape, dtype=torch.float32, device=weights.device)
    _launch(_powers, weights, scale, zero, norm, sums)
    return sums


def _launch(
    kernel: Any, weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, *own: Any, **constants: Any
) -> None:
    """Run a kernel on all groups: the weights and where they lie, the grids, then what is the kernel's own."""
    groups = scale.shape[-1]
    size = weights.shape[-1] // groups
    block = _ELEMENTS // size
    with device_of(weights):
        kernel[(cdiv(scale.numel(), block),)](
            weights,
            weights.shape[1],
            weights.stride(0),
            weights.stride(1),
            scale.contiguous(),
            zero.contiguous(),
            scale.numel(),
            *own,
            GROUPS=groups,
            GROUP=size,
            BLOCK=block,
            LAST=MAX_CODE,
            num_warps=_WARPS,
            **constants,
        )


@triton.jit
def nearest_code(steps, LAST: tl.constexpr):
    """Return the codes, as floats, nearest to weights in steps of their grid, w/s + z."""
    return tl.minimum(tl.maximum(tl.floor(steps + 0.5), 0.0), LAST)


@triton.jit
def _nearest(
    weights,
    rows,
    batch_stride,
    row_stride,
    scales,
    zeros,
    group,
    inside,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    LAST: tl.constexpr,
):
    """Return the weights [BLOCK, GROUP] of some groups, these and their codes in steps of the grid, and the scales."""
    column = tl.arange(0, GROUP)
    row = group // GROUPS
    start = (row // rows) * batch_stride + (row % rows) * row_stride + (group % GROUPS) * GROUP
    values = tl.load(weights + start[:, None] + column[None, :], mask=inside[:, None], other=0.0)
    scale = tl.load(scales + group, mask=inside, other=1.0).to(tl.float32)
    zero = tl.load(zeros + group, mask=inside, other=0.0).to(tl.float32)
    steps = zero[:, None] + values / scale[:, None]
    return values, steps, nearest_code(steps, LAST), scale


@triton.jit
def _sums(
    weights,
    rows,
    batch_stride,
    row_stride,
    scales,
    zeros,
    total,
    shares,
    share_stride,
    sum_code,
    sum_square,
    sum_product,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    LAST: tl.constexpr,
    WEIGHED: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = group < total
    values, _, codes, _ = _nearest(
        weights, rows, batch_stride, row_stride, scales, zeros, group, inside, GROUPS, GROUP, LAST
    )
    if WEIGHED:
        start = (group // GROUPS // rows) * share_stride + (group % GROUPS) * GROUP
        column = tl.arange(0, GROUP)
        counted = codes * tl.load(shares + start[:, None] + column[None, :], mask=inside[:, None], other=0.0)
    else:
        counted = codes * (1.0 / GROUP)
    tl.store(sum_code + group, tl.sum(counted, 1), mask=inside)
    tl.store(sum_square + group, tl.sum(counted * codes, 1), mask=inside)
    tl.store(sum_product + group, tl.sum(counted * values, 1), mask=inside)


@triton.jit
def _codes(
    weights,
    rows,
    batch_stride,
    row_stride,
    scales,
    zeros,
    total,
    out,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    LAST: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = group < total
    _, _, codes, _ = _nearest(
        weights, rows, batch_stride, row_stride, scales, zeros, group, inside, GROUPS, GROUP, LAST
    )
    places = out + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    tl.store(places, codes.to(tl.uint8), mask=inside[:, None])


@triton.jit
def _half_quadratic(
    weights,
    rows,
    batch_stride,
    row_stride,
    scales,
    zeros,
    total,
    beta,
    exponent,
    sum_size,
    update,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    LAST: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = group < total
    _, steps, codes, scale = _nearest(
        weights, rows, batch_stride, row_stride, scales, zeros, group, inside, GROUPS, GROUP, LAST
    )
    error = (steps - codes) * scale[:, None]
    size = tl.abs(error)
    # |x|^(p-1), finite where x is 0: there the shrunk error is 0 anyhow
    threshold = tl.exp2(tl.log2(tl.maximum(size, 1e-30)) * exponent) / beta
    shrunk = tl.maximum(size - threshold, 0.0)
    shrunk = tl.where(error < 0, -shrunk, shrunk) / scale[:, None]
    zero = tl.load(zeros + group, mask=inside, other=0.0).to(tl.float32)
    tl.store(sum_size + group, tl.sum(size, 1), mask=inside)
    # steps hold the old zero point already
    tl.store(update + group, zero + tl.sum(codes - steps + shrunk, 1) / GROUP, mask=inside)


@triton.jit
def _powers(
    weights,
    rows,
    batch_stride,
    row_stride,
    scales,
    zeros,
    total,
    exponent,
    sums,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    LAST: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = group < total
    _, steps, codes, scale = _nearest(
        weights, rows, batch_stride, row_stride, scales, zeros, group, inside, GROUPS, GROUP, LAST
    )
    size = tl.abs((steps - codes) * scale[:, None])
    power = tl.where(size > 0, tl.exp2(tl.log2(tl.maximum(size, 1e-30)) * exponent), 0.0)
    tl.store(sums + group, tl.sum(power, 1), mask=inside)
