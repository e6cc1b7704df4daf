"""One step of learned codes on a GPU: from the gradient at a layer's weights to its new weights, in one kernel.

A program takes one group of a few rows. It reads the gradient and the latents once, adds up what the groups' scales and
zero points get, moves all of them by Adam, and writes the weights that the new codes stand for. In separate tensor
operations the same takes fifteen passes over tensors of the layer's size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..launch import device_of
from ..sizes import cdiv

ROWS = 8
"""Rows of a program."""


@triton.jit
def adam(value, gradient, first, second, rate, bias1, bias2, BETA1: tl.constexpr, BETA2: tl.constexpr):
    """Adam's step: the new value and the new moments."""
    first = BETA1 * first + (1 - BETA1) * gradient
    second = BETA2 * second + (1 - BETA2) * gradient * gradient
    return value - rate * (first * bias1) / (tl.sqrt(second * bias2) + 1e-12), first, second


@triton.jit(do_not_specialize=["rate_latent", "rate_scale", "rate_zero"])
def _step_kernel(
    gradient_ptr, out_ptr, latent_ptr, latent1_ptr, latent2_ptr, begin_ptr, change_ptr, change1_ptr, change2_ptr,
    zero_ptr, zero1_ptr, zero2_ptr, active_ptr, pace_ptr, N, K, gradient_batch, out_batch,
    rate_latent, rate_scale, rate_zero,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr,
    MIN_SCALE: tl.constexpr, MAX_SCALE: tl.constexpr,
):  # fmt: skip
    """One group of ROWS rows of one matrix; rows of gradient and out are K long, matrices so far apart as stated."""
    group, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    active = tl.load(active_ptr + batch) * tl.load(pace_ptr)
    bias1, bias2 = tl.load(pace_ptr + 1), tl.load(pace_ptr + 2)
    of_group = (batch * N + row) * (K // GROUP) + group
    begin = tl.load(begin_ptr + of_group, mask=inside, other=1.0)
    change = tl.load(change_ptr + of_group, mask=inside, other=0.0)
    zero = tl.load(zero_ptr + of_group, mask=inside, other=0.0)
    scale = tl.minimum(tl.maximum(begin * (1 + change), MIN_SCALE), MAX_SCALE).to(tl.float16).to(tl.float32)
    stored_zero = tl.minimum(tl.maximum(zero, -MAX_SCALE), MAX_SCALE).to(tl.float16).to(tl.float32)
    column = group * GROUP + tl.arange(0, GROUP)
    mask = inside[:, None] & (column >= 0)[None, :]
    in_matrix = row.to(tl.int64)[:, None] * K + column[None, :]
    place = batch * N * K + in_matrix
    gradient = tl.load(gradient_ptr + batch * gradient_batch + in_matrix, mask=mask, other=0.0).to(tl.float32)
    latent = tl.load(latent_ptr + place, mask=mask, other=0.0)
    code = tl.minimum(tl.maximum(tl.floor(latent + 0.5), 0.0), 7.0)
    at_change = tl.sum(gradient * (code - stored_zero[:, None]), 1) * begin
    at_zero = -tl.sum(gradient * scale[:, None], 1)
    at_latent = tl.where((latent >= -0.5) & (latent <= 7.5), gradient * scale[:, None], 0.0)
    latent1 = tl.load(latent1_ptr + place, mask=mask, other=0.0)
    latent2 = tl.load(latent2_ptr + place, mask=mask, other=0.0)
    latent, latent1, latent2 = adam(
        latent, at_latent, latent1, latent2, rate_latent * active, bias1, bias2, BETA1, BETA2
    )  # fmt: skip
    tl.store(latent_ptr + place, latent, mask=mask)
    tl.store(latent1_ptr + place, latent1, mask=mask)
    tl.store(latent2_ptr + place, latent2, mask=mask)
    change1 = tl.load(change1_ptr + of_group, mask=inside, other=0.0)
    change2 = tl.load(change2_ptr + of_group, mask=inside, other=0.0)
    change, change1, change2 = adam(
        change, at_change, change1, change2, rate_scale * active, bias1, bias2, BETA1, BETA2
    )  # fmt: skip
    tl.store(change_ptr + of_group, change, mask=inside)
    tl.store(change1_ptr + of_group, change1, mask=inside)
    tl.store(change2_ptr + of_group, change2, mask=inside)
    zero1 = tl.load(zero1_ptr + of_group, mask=inside, other=0.0)
    zero2 = tl.load(zero2_ptr + of_group, mask=inside, other=0.0)
    zero, zero1, zero2 = adam(zero, at_zero, zero1, zero2, rate_zero * active, bias1, bias2, BETA1, BETA2)
    tl.store(zero_ptr + of_group, zero, mask=inside)
    tl.store(zero1_ptr + of_group, zero1, mask=inside)
    tl.store(zero2_ptr + of_group, zero2, mask=inside)
    scale = tl.minimum(tl.maximum(begin * (1 + change), MIN_SCALE), MAX_SCALE).to(tl.float16).to(tl.float32)
    stored_zero = tl.minimum(tl.maximum(zero, -MAX_SCALE), MAX_SCALE).to(tl.float16).to(tl.float32)
    code = tl.minimum(tl.maximum(tl.floor(latent + 0.5), 0.0), 7.0)
    weight = scale[:, None] * (code - stored_zero[:, None])
    tl.store(out_ptr + batch * out_batch + in_matrix, weight.to(out_ptr.dtype.element_ty), mask=mask)


def step_base(
    latents: Any,
    gradient: torch.Tensor,
    out: torch.Tensor,
    rates: tuple[float, float, float],
    betas: tuple[float, float],
    limits: tuple[float, float],
    pace: torch.Tensor,
) -> None:
    """Take one step of Adam on a batch of matrices and write the new weights; all in place.

    Args:
        latents: latents [B, N, K], scales and zero points [B, N, G] and their Adam states, float32 and contiguous, by
            the names of the converter's ``BaseLatents``.
        gradient: of the loss at the weights, [B, N, K]; rows contiguous and K apart.
        out: the weights, likewise.
        rates: of latents, of the relative change of scales, of zero points.
        betas: Adam's.
        limits: least and largest scale.
        pace: float32 [3]: share of the rates in this step, and what Adam's first and second moments are multiplied by.
    """
    batch, n, k = gradient.shape
    for tensor in (gradient, out):
        if tensor.stride()[1:] != (k, 1):
            raise ValueError(f"rows must be contiguous and K = {k} apart, found strides {tensor.stride()}")
    groups = latents.change.shape[-1]
    with device_of(gradient):
        _step_kernel[(groups, cdiv(n, ROWS), batch)](
            gradient,
            out,
            latents.latent,
            latents.adam_latent.first,
            latents.adam_latent.second,
            latents.begin_scale,
            latents.change,
            latents.adam_change.first,
            latents.adam_change.second,
            latents.zero,
            latents.adam_zero.first,
            latents.adam_zero.second,
            latents.active,
            pace,
            n,
            k,
            gradient.stride(0),
            out.stride(0),
            *rates,
            GROUP=k // groups,
            ROWS=ROWS,
            BETA1=betas[0],
            BETA2=betas[1],
            MIN_SCALE=limits[0],
            MAX_SCALE=limits[1],
            num_warps=4,
        )
