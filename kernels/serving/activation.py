"""The activation between the GEMMs while tokens are few; with many the first GEMM's epilogue applies it.

Biases of the first GEMM, clamps, other constants than SiLU's, and experts without a gate are always here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import LaunchMode, launch
from ..sizes import cdiv
from ..weights import MoESpec
from .gemm.lanes import lane_order
from .layout import UNIT
from .projection.launcher import Projected
from .routing import Routes, local_expert


@triton.jit
def _sigmoid(x, ASM: tl.constexpr):
    """1 / (1 + exp(-x)) in fp32; with ASM without the care for numbers below 2^-126, which takes half of the time."""
    if not ASM:
        return 1.0 / (1.0 + tl.exp(-x))
    asm: tl.constexpr = (
        "{ .reg .f32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; add.f32 e, e, 0f3F800000;"  # -log2(e)
        " rcp.approx.ftz.f32 $0, e; }"
    )
    return tl.inline_asm_elementwise(asm, "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr, ASM: tl.constexpr = False):
    """act(gate)·up in fp32, never larger than |gate·up|."""
    if ACTIVATION == "silu":
        return gate * _sigmoid(gate, ASM) * up
    if ACTIVATION == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    return gate * (1.0 - 1.0 / (tl.exp(2.0 * inner) + 1.0)) * up  # 0.5·(1 + tanh(inner))


@triton.jit
def _limited(gate, up, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr):
    """What :class:`...weights.MoESpec` says of an activation with constants, in fp32."""
    if ACTIVATION == "swiglustep":
        return tl.minimum(gate / (1.0 + tl.exp(-gate)), LIMIT) * tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    if LIMIT != 0.0:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    if ACTIVATION == "silu":
        return gate / (1.0 + tl.exp(-ALPHA * gate)) * (up + BETA)
    return gated(gate, up, ACTIVATION)


@triton.jit(do_not_specialize=["num_pairs"])
def _activation_kernel(
    y_ptr, h_ptr, sums_ptr, lanes_ptr, bias_ptr, ids_ptr, map_ptr, size, num_pairs,
    ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MAP: tl.constexpr, SPLIT_K: tl.constexpr, SUM: tl.constexpr, LANES: tl.constexpr,
    UNITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h = act(gate)·up of one pair over UNITS units, its sums, and with ``LANES`` h in `lane_order`.

    y is [SPLIT_K, num_pairs, 2·size], gate first.

    Without a gate h = act(up), y [SPLIT_K, num_pairs, size]. Biases [experts, 2·size or size] are those of the pair's
    expert.

    Its step in :mod:`.protocol` is ``ACTIVATE``.
    """
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
        if GATED:
            row = y_ptr + (split * num_pairs + pair) * (2 * size) + k
            gate += tl.load(row, mask=inside, other=0.0).to(tl.float32)
            up += tl.load(row + size, mask=inside, other=0.0).to(tl.float32)
        else:
            up += tl.load(y_ptr + (split * num_pairs + pair) * size + k, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        # rows of pairs whose expert is not local hold nothing of use, whatever is added
        expert = tl.maximum(local_expert(ids_ptr, map_ptr, pair, True, HAS_MAP), 0).to(tl.int64)
        if GATED:
            gate += tl.load(bias_ptr + expert * (2 * size) + k, mask=inside, other=0.0)
            up += tl.load(bias_ptr + expert * (2 * size) + size + k, mask=inside, other=0.0)
        else:
            up += tl.load(bias_ptr + expert * size + k, mask=inside, other=0.0)
    if not GATED:
        root = tl.maximum(up, 0.0)
        h = (root * root).to(h_ptr.dtype.element_ty)
    elif LIMIT != 0.0 or ALPHA != 1.0 or BETA != 0.0:
        h = _limited(gate, up, ACTIVATION, LIMIT, ALPHA, BETA).to(h_ptr.dtype.element_ty)
    else:
        h = gated(gate, up, ACTIVATION).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + pair * size + k, h, mask=inside)
    if LANES:
        row = lanes_ptr + (pair * tl.cdiv(size, 128) + first_unit) * 128
        whole = k < tl.cdiv(size, 128) * 128
        tl.store(row + lane_order(UNITS * 128), tl.where(inside, h, 0.0), mask=whole)
    per_unit: tl.constexpr = 128 // SUM
    group = tl.arange(0, UNITS * per_unit)
    unit = first_unit + group // per_unit
    sums = tl.sum(tl.reshape(tl.where(inside, h.to(tl.float32), 0.0), (UNITS * per_unit, SUM)), 1)
    target = sums_ptr + (unit * num_pairs + pair) * per_unit + group % per_unit
    tl.store(target, sums, mask=unit < (size + 127) // 128)


@triton.jit
def power_of_two(largest):
    """(2^e, 2^-e) with 2^e <= largest < 2^(e + 1), within what fp32 holds."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


def activate(
    y: torch.Tensor,
    spec: MoESpec,
    bias: torch.Tensor | None,
    routes: Routes,
    group_size: int,
    need_lanes: bool,
    dtype: torch.dtype,
    mode: LaunchMode,
) -> Projected:
    """Return the second GEMM's input without V·x: act(gate)·up, ``dtype`` [pairs, I], and its sums.

    Rows of pairs whose expert is not local hold nothing of use.

    Args:
        y: the first GEMM's output [split_k, pairs, 2I], gate first; without a gate [split_k, pairs, I].
        spec: the activation and its constants.
        bias: what is added to y before, fp32 [E, 2I] or [E, I] by the pair's expert; None for nothing.
        routes: the pairs' experts.
        group_size: 32, 64 or 128.
        need_lanes: whether the second GEMM wants the rows in the order of lanes.
        dtype: fp16 or bf16.
        mode: how to launch.
    """
    split_k, num_pairs, both = y.shape
    size = both // 2 if spec.is_gated else both
    has_bias = bias is not None
    units = cdiv(size, UNIT)
    sum_size = min(group_size, 64)
    h = torch.empty(num_pairs, size, dtype=dtype, device=y.device)
    sums = torch.empty(units, num_pairs, 128 // sum_size, dtype=torch.float32, device=y.device)
    lanes = torch.empty(num_pairs, units * UNIT, dtype=dtype, device=y.device) if need_lanes else None
    units_a_program = 4
    launch(
        _activation_kernel,
        (num_pairs, cdiv(units, units_a_program)),
        mode,
        y,
        h,
        sums,
        lanes,
        bias,
        routes.ids if has_bias else None,
        routes.expert_map if has_bias else None,
        size,
        num_pairs,
        ACTIVATION=spec.activation,
        LIMIT=spec.limit,
        ALPHA=spec.alpha,
        BETA=spec.beta,
        GATED=spec.is_gated,
        HAS_BIAS=has_bias,
        HAS_MAP=has_bias and routes.expert_map is not None,
        SPLIT_K=split_k,
        SUM=sum_size,
        LANES=need_lanes,
        UNITS=units_a_program,
        PDL=mode.early,
        num_warps=2,
    )
    return Projected(h, sums, None, lanes=lanes)
