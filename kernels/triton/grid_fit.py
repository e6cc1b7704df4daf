"""The nearest codes of groups on their grids, and the sums that a regression on them needs, for the converter on GPUs.

Each reads the weights once, where torch reads and writes them a dozen times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..packing import MAX_CODE

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
    groups = scale.shape[-1]
    sums = [torch.empty(scale.shape, dtype=torch.float32, device=weights.device) for _ in range(3)]
    size = weights.shape[-1] // groups
    _sums[_grid(scale, size)](
        weights,
        scale.contiguous(),
        zero.contiguous(),
        weights if share is None else share,
        *sums,
        scale.numel(),
        weights.shape[1],
        weights.stride(0),
        weights.stride(1),
        share.stride(0) if share is not None and len(share) > 1 else 0,
        GROUPS=groups,
        GROUP=size,
        BLOCK=_block(size),
        WEIGHED=share is not None,
        LAST=MAX_CODE,
        num_warps=_WARPS,
    )
    return sums[0], sums[1], sums[2]


def nearest_codes(weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Return the nearest codes, uint8 [B, N, K], of weights as :func:`code_sums` takes them."""
    groups = scale.shape[-1]
    size = weights.shape[-1] // groups
    codes = torch.empty(weights.shape, dtype=torch.uint8, device=weights.device)
    _codes[_grid(scale, size)](
        weights,
        scale.contiguous(),
        zero.contiguous(),
        codes,
        scale.numel(),
        weights.shape[1],
        weights.stride(0),
        weights.stride(1),
        GROUPS=groups,
        GROUP=size,
        BLOCK=_block(size),
        LAST=MAX_CODE,
        num_warps=_WARPS,
    )
    return codes


def _block(size: int) -> int:
    return _ELEMENTS // size


def _grid(scale: torch.Tensor, size: int) -> tuple[int]:
    return (triton.cdiv(scale.numel(), _block(size)),)


@triton.jit
def _nearest(
    weights,
    scales,
    zeros,
    group,
    inside,
    rows,
    batch_stride,
    row_stride,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    LAST: tl.constexpr,
):
    """Return the weights [BLOCK, GROUP] of some groups and their codes, as floats."""
    column = tl.arange(0, GROUP)
    row = group // GROUPS
    start = (row // rows) * batch_stride + (row % rows) * row_stride + (group % GROUPS) * GROUP
    values = tl.load(weights + start[:, None] + column[None, :], mask=inside[:, None], other=0.0)
    scale = tl.load(scales + group, mask=inside, other=1.0).to(tl.float32)
    zero = tl.load(zeros + group, mask=inside, other=0.0).to(tl.float32)
    steps = zero[:, None] + values / scale[:, None]
    return values, tl.minimum(tl.maximum(tl.floor(steps + 0.5), 0.0), LAST)


@triton.jit
def _sums(
    weights,
    scales,
    zeros,
    shares,
    sum_code,
    sum_square,
    sum_product,
    total,
    rows,
    batch_stride,
    row_stride,
    share_stride,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHED: tl.constexpr,
    LAST: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = group < total
    values, codes = _nearest(weights, scales, zeros, group, inside, rows, batch_stride, row_stride, GROUPS, GROUP, LAST)
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
    scales,
    zeros,
    out,
    total,
    rows,
    batch_stride,
    row_stride,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    LAST: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = group < total
    codes = _nearest(weights, scales, zeros, group, inside, rows, batch_stride, row_stride, GROUPS, GROUP, LAST)[1]
    places = out + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    tl.store(places, codes.to(tl.uint8), mask=inside[:, None])
