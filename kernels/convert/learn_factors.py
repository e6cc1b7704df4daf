"""One step of learned factors on a GPU: from the gradient at rounded factors to the new ones, in one kernel.

A program takes some groups of values that share one scale. In separate tensor operations the same is fifty launches,
which for small experts take longer than everything else of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..launch import device_of
from ..sizes import cdiv
from .factor_fit import BLOCK, GROUP
from .learn import adam


class FactorState(NamedTuple):
    """What a step reads and writes of the factors of a batch of matrices.

    Attributes:
        values: float32 [B, r, C].
        scale: float32 [B, r, C/64]; None where factors are stored as they are.
        moments: Adam's first and second moments of the values, then of the scales; like these.
        sizes: what the rates of values, then of scales, are relative to; float32 [B, 1, 1].
        trained: 1 for rows that are trained, 0 for others; float32 [B, r].
    """

    values: torch.Tensor
    scale: torch.Tensor | None
    moments: Sequence[torch.Tensor]
    sizes: Sequence[torch.Tensor]
    trained: torch.Tensor


@triton.jit(do_not_specialize=["rate"])
def _step_kernel(
    gradient_ptr, out_ptr, value_ptr, value1_ptr, value2_ptr, size_ptr, scale_ptr, scale1_ptr, scale2_ptr,
    scale_size_ptr, trained_ptr, pace_ptr, groups, in_row, in_matrix, rate, least, low, high,
    SCALED: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr,
):  # fmt: skip
    """BLOCK groups of GROUP values; ``in_row`` groups make a row, ``in_matrix`` a matrix."""
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = group < groups
    trained = tl.load(trained_ptr + group // in_row, mask=inside, other=0.0)
    moved = rate * tl.load(pace_ptr)
    bias1, bias2 = tl.load(pace_ptr + 1), tl.load(pace_ptr + 2)
    place = group.to(tl.int64)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = inside[:, None] & (place >= 0)
    gradient = tl.load(gradient_ptr + place, mask=mask, other=0.0).to(tl.float32) * trained[:, None]
    value = tl.load(value_ptr + place, mask=mask, other=0.0)
    if SCALED:
        scale = tl.load(scale_ptr + group, mask=inside, other=1.0)
        # rounded as torch rounds: what lies on a code pulls at no scale, and Adam would make a step of any noise
        steps = tl.div_rn(value, tl.maximum(scale, least).to(tl.float16).to(tl.float32)[:, None])
        held = (steps >= low - 0.5) & (steps <= high + 0.5)
        code = tl.minimum(tl.maximum(tl.floor(steps + 0.5), low), high)
        at_scale = tl.sum(gradient * (code - tl.where(held, steps, 0.0)), 1)
        gradient = tl.where(held, gradient, 0.0)
        scale1 = tl.load(scale1_ptr + group, mask=inside, other=0.0)
        scale2 = tl.load(scale2_ptr + group, mask=inside, other=0.0)
        scale_rate = moved * tl.load(scale_size_ptr + group // in_matrix, mask=inside, other=0.0)
        scale, scale1, scale2 = adam(scale, at_scale, scale1, scale2, scale_rate, bias1, bias2, BETA1, BETA2)
        tl.store(scale_ptr + group, scale, mask=inside)
        tl.store(scale1_ptr + group, scale1, mask=inside)
        tl.store(scale2_ptr + group, scale2, mask=inside)
    value1 = tl.load(value1_ptr + place, mask=mask, other=0.0)
    value2 = tl.load(value2_ptr + place, mask=mask, other=0.0)
    value_rate = moved * tl.load(size_ptr + group // in_matrix, mask=inside, other=0.0)
    value, value1, value2 = adam(value, gradient, value1, value2, value_rate[:, None], bias1, bias2, BETA1, BETA2)
    tl.store(value_ptr + place, value, mask=mask)
    tl.store(value1_ptr + place, value1, mask=mask)
    tl.store(value2_ptr + place, value2, mask=mask)
    if SCALED:
        stored = tl.maximum(scale, least).to(tl.float16).to(tl.float32)[:, None]
        value = tl.minimum(tl.maximum(tl.floor(tl.div_rn(value, stored) + 0.5), low), high) * stored
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=mask)


def step_factor(
    state: FactorState,
    gradient: torch.Tensor,
    out: torch.Tensor,
    rate: float,
    betas: tuple[float, float],
    limits: tuple[int, int, float],
    pace: torch.Tensor,
) -> None:
    """Take one step of Adam on the factors of a batch of matrices and write the new ones as stored; all in place.

    Args:
        state: the factors, contiguous.
        gradient: of the loss at the stored factors, [B, r, C].
        out: the stored factors, [B, r, C] and contiguous. Rows that no matrix has are 0 and stay so.
        rate: of values and scales, relative to their sizes.
        betas: Adam's.
        limits: the least and the largest code, and the least scale.
        pace: float32 [3]: share of the rates in this step, and what Adam's first and second moments are multiplied by.
    """
    values, scaled = state.values, state.scale is not None
    moments, sizes = list(state.moments), list(state.sizes)
    if not scaled:  # the kernel reads none of these
        moments, sizes = moments * 2, sizes * 2
    in_row = values.shape[-1] // GROUP
    groups = values.numel() // GROUP
    with device_of(values):
        _step_kernel[(cdiv(groups, BLOCK),)](
            gradient.contiguous(),
            out,
            values,
            moments[0],
            moments[1],
            sizes[0],
            state.scale if scaled else values,
            moments[2],
            moments[3],
            sizes[1],
            state.trained,
            pace,
            groups,
            in_row,
            in_row * values.shape[-2],
            rate,
            limits[2],
            float(limits[0]),
            float(limits[1]),
            SCALED=scaled,
            GROUP=GROUP,
            BLOCK=BLOCK,
            BETA1=betas[0],
            BETA2=betas[1],
            num_warps=4,
        )
