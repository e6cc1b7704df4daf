"""Elementwise steps before the GEMMs: the gated activation, and fp16 rows for :func:`.dequant.fast_operand`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import LaunchMode
from .layout import UNIT

MAX_ROW = 32768
"""Longest row that one program takes whole, as fp16 activations need it."""


class Activated(NamedTuple):
    """Input of the second GEMM: x [pairs, I], its sums (empty with ``row_scale``), and ``row_scale`` or None."""

    x: torch.Tensor
    sums: torch.Tensor
    row_scale: torch.Tensor | None


@triton.jit
def _activate(gate, up, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return gate / (1.0 + tl.exp(-gate)) * up
    if ACTIVATION == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    return gate * (1.0 - 1.0 / (tl.exp(2.0 * inner) + 1.0)) * up  # 0.5·(1 + tanh(inner))


@triton.jit(do_not_specialize=["num_pairs"])
def _activation_kernel(
    y_ptr, h_ptr, sums_ptr, size, num_pairs,
    ACTIVATION: tl.constexpr, SPLIT_K: tl.constexpr, SUM: tl.constexpr, UNITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h = act(gate)·up of one pair over UNITS units, and its sums; y [SPLIT_K, num_pairs, 2·size], gate first."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    pair = tl.program_id(0).to(tl.int64)
    first_unit = tl.program_id(1) * UNITS
    k = first_unit * 128 + tl.arange(0, UNITS * 128)
    inside = k < size
    gate = tl.zeros((UNITS * 128,), tl.float32)
    up = tl.zeros((UNITS * 128,), tl.float32)
    for split in tl.static_range(SPLIT_K):
        row = y_ptr + (split * num_pairs + pair) * (2 * size) + k
        gate += tl.load(row, mask=inside, other=0.0).to(tl.float32)
        up += tl.load(row + size, mask=inside, other=0.0).to(tl.float32)
    h = _activate(gate, up, ACTIVATION).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + pair * size + k, h, mask=inside)
    per_unit: tl.constexpr = 128 // SUM
    group = tl.arange(0, UNITS * per_unit)
    unit = first_unit + group // per_unit
    sums = tl.sum(tl.reshape(tl.where(inside, h.to(tl.float32), 0.0), (UNITS * per_unit, SUM)), 1)
    target = sums_ptr + (unit * num_pairs + pair) * per_unit + group % per_unit
    tl.store(target, sums, mask=unit < (size + 127) // 128)


@triton.jit
def _power_of_two(largest):
    """(2^e, 2^-e) with 2^e <= largest < 2^(e + 1), within what fp32 holds."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _to_half_kernel(x_ptr, out_ptr, row_scale_ptr, K, BLOCK: tl.constexpr):
    """One row of x in fp16, divided by a power of two so that its largest value is between 1 and 2."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    scale, inverse = _power_of_two(tl.max(tl.abs(x), 0))
    tl.store(out_ptr + row * K + k, (x * inverse).to(tl.float16), mask=k < K)
    tl.store(row_scale_ptr + row, scale)


@triton.jit
def _activation_to_half_kernel(
    y_ptr, out_ptr, row_scale_ptr, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Like :func:`_to_half_kernel`, of act(gate)·up of a row of y [pairs, 2·size]."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    gate = tl.load(y_ptr + row * 2 * size + k, mask=k < size, other=0.0).to(tl.float32)
    up = tl.load(y_ptr + row * 2 * size + size + k, mask=k < size, other=0.0).to(tl.float32)
    h = _activate(gate, up, ACTIVATION)
    scale, inverse = _power_of_two(tl.max(tl.abs(tl.where(k < size, h, 0.0)), 0))
    tl.store(out_ptr + row * size + k, (h * inverse).to(tl.float16), mask=k < size)
    tl.store(row_scale_ptr + row, scale)


def to_half(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x [rows, K] as fp16 and fp32 [rows] powers of two that it was divided by.

    bf16 has 8 significant bits and fp16 11: values down to 2^-15 of a row's largest lose nothing, smaller ones
    what is 2^-25 of it.
    """
    rows, k = x.shape
    out = torch.empty(rows, k, dtype=torch.float16, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    _to_half_kernel[(rows,)](x, out, scale, k, BLOCK=triton.next_power_of_2(k), num_warps=_warps(k))
    return out, scale


def activate_to_half(y: torch.Tensor, activation: str) -> Activated:
    """Return act(gate)·up of y [pairs, 2I] as :func:`to_half` returns it."""
    pairs, both = y.shape
    size = both // 2
    out = torch.empty(pairs, size, dtype=torch.float16, device=y.device)
    scale = torch.empty(pairs, dtype=torch.float32, device=y.device)
    block = triton.next_power_of_2(size)
    _activation_to_half_kernel[(pairs,)](
        y, out, scale, size, ACTIVATION=activation, BLOCK=block, num_warps=_warps(size)
    )
    return Activated(out, out.new_empty(0, dtype=torch.float32), scale)


def _warps(row: int) -> int:
    return max(2, min(16, triton.next_power_of_2(row) // 1024))


def activate(y: torch.Tensor, activation: str, group_size: int, dtype: torch.dtype, mode: LaunchMode) -> Activated:
    """Return act(gate)·up, ``dtype`` [pairs, I], and its sums, as in :class:`.project.Projected`.

    Rows of pairs whose expert is not local hold nothing of use.

    Args:
        y: the first GEMM's output [split_k, pairs, 2I], gate first.
        activation: a key of :data:`..reference.ACTIVATIONS`.
        group_size: 32, 64 or 128.
        dtype: fp16 or bf16.
        mode: how to launch.
    """
    split_k, num_pairs, both = y.shape
    size = both // 2
    units = triton.cdiv(size, UNIT)
    sum_size = min(group_size, 64)
    h = torch.empty(num_pairs, size, dtype=dtype, device=y.device)
    sums = torch.empty(units, num_pairs, 128 // sum_size, dtype=torch.float32, device=y.device)
    units_a_program = 4
    _activation_kernel[(num_pairs, triton.cdiv(units, units_a_program))](
        y,
        h,
        sums,
        size,
        num_pairs,
        ACTIVATION=activation,
        SPLIT_K=split_k,
        SUM=sum_size,
        UNITS=units_a_program,
        PDL=mode.early,
        num_warps=2,
        **mode.options(),
    )
    return Activated(h, sums, None)
