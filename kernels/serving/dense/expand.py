"""A dense layer's weights with the compensators in 16 bits: for a plain GEMM, of very many tokens or of any.

A tile of the GEMM in 3 bits dequantizes its weights for its own tokens and multiplies V and U apart. With thousands of
tokens that is done for every block of them, and the ranks of attention are a large part of the products: W + Uᵀ·V costs
a fixed time, after which the GEMM is that of an unquantized layer. On an H200 8192 tokens take 0.65 ms in Mixtral's QKV
with ranks of 512, where tiles of 3 bits take 1.20. The 16 bits live as long as the call, or as the layer, where a
server has room for them (:func:`...ops.expand_linear`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...launch import launch, launch_mode
from ...sizes import cdiv
from ...weights import LinearSpec, largest_rank
from ..gemm.arguments import Compensators, Shape, Weights
from ..gemm.dequant import code_operand, finished, scale_and_zero, scale_of_codes, scaled, unit_of_scales
from ..gemm.launcher import MAX_PARTS
from ..gemm.tile import tile_part
from ..gemm.up_factor import Columns, part_ranks, up_factor
from ..layout import UNIT, KernelWeights
from ..padding import padded
from ..projection.arguments import Factor

BLOCK_N = 128
RANK_STEP = 64


class Tile(NamedTuple):
    """The constants that the kernel is compiled for, in the words of :class:`..gemm.arguments.Tile`."""

    PARTS: int
    GROUP: int
    FACTOR_BITS: int
    HAS_RANK: bool
    BF16: bool
    ASM: bool
    BLOCK_N: int
    RANK_STEP: int
    STAGES: int


@triton.jit
def _down_factor(factor, units, unit, row, in_rank, TILE: tl.constexpr):
    """V of ``row`` [RANK_STEP] and both halves of a unit, 16 bits, each [RANK_STEP, 64]."""
    BF16: tl.constexpr = TILE.BF16
    first = (row // 16).to(tl.int64) * units + unit
    scale0, scale1 = scale_and_zero(tl.load(factor.v_scale + first * 16 + row % 16, mask=in_rank, other=0))
    if TILE.FACTOR_BITS == 3:
        lane = tl.arange(0, 4)
        words = factor.v + (first * 192 + row % 16 * 4)[:, None] + lane[None, :]
        mask = in_rank[:, None] & (lane >= 0)[None, :]
        w0 = tl.load(words, mask=mask, other=0)
        w1 = tl.load(words + 64, mask=mask, other=0)
        w2 = tl.load(words + 128, mask=mask, other=0)
        four = tl.full((TILE.RANK_STEP,), 4.0, tl.float32)
        codes0 = code_operand(w0, w1, w2, 0, BF16, BF16, TILE.ASM, False, TILE.RANK_STEP)
        codes1 = code_operand(w0, w1, w2, 1, BF16, BF16, TILE.ASM, False, TILE.RANK_STEP)
        return scaled(codes0, scale0, four, 0, BF16), scaled(codes1, scale1, four, 1, BF16)
    dtype: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    values = factor.v + ((row.to(tl.int64) * units + unit) * 128)[:, None] + tl.arange(0, 64)[None, :]
    v0 = tl.load(values, mask=in_rank[:, None], other=0).to(tl.float32) * scale0[:, None]
    v1 = tl.load(values + 64, mask=in_rank[:, None], other=0).to(tl.float32) * scale1[:, None]
    return v0.to(dtype), v1.to(dtype)


@triton.jit
def _add_weights(acc, weights, w0, w1, w2, unit, n, inside, N, HALF: tl.constexpr, TILE: tl.constexpr):
    """acc + s·(q - z) of a half of a unit, fp32 [BLOCK_N, 64]."""
    BF16: tl.constexpr = TILE.BF16
    groups: tl.constexpr = 128 // TILE.GROUP
    codes = code_operand(w0, w1, w2, HALF, BF16, BF16, TILE.ASM, False, TILE.BLOCK_N)
    group = (HALF * 64 + tl.arange(0, 64)) // TILE.GROUP
    place = weights.scale_zero + (unit * N * groups + n * groups)[:, None] + group[None, :]
    scale, zero = scale_and_zero(tl.load(place, mask=inside[:, None] & (group >= 0)[None, :], other=0))
    factor, offset = scale_of_codes(scale * unit_of_scales(tl.load(weights.exponents), 0), zero, HALF, BF16)
    return acc + (codes.to(tl.float32) * factor - offset)


@triton.jit
def _expand_kernel(out_ptr, weights, compensators, factor, shape, TILE: tl.constexpr):
    """BLOCK_N rows and one unit of W + Uᵀ·V, rounded once, into [N, K]; parameters as of :mod:`..gemm.arguments`.

    Its step in :mod:`..protocol` is ``EXPAND``.
    """
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    N = shape.N
    K = shape.K
    unit = tl.program_id(1).to(tl.int64)
    units = tl.cdiv(K, 128)
    part, start, first_column, width = tile_part(tl.program_id(0), shape, BLOCK_N, TILE.PARTS)
    column = first_column + tl.arange(0, BLOCK_N)
    inside = column < width
    n = start + column
    acc0 = tl.zeros((BLOCK_N, 64), tl.float32)
    acc1 = tl.zeros((BLOCK_N, 64), tl.float32)
    if TILE.HAS_RANK:
        ranks = part_ranks(compensators, 0, part, TILE.PARTS)
        columns = Columns(first_column, column, inside, width)
        for block in tl.range(0, ranks.blocks, TILE.RANK_STEP // 16, num_stages=TILE.STAGES):
            lane = block * 16 + tl.arange(0, TILE.RANK_STEP)
            v0, v1 = _down_factor(factor, units, unit, ranks.before + lane, lane < ranks.blocks * 16, TILE)
            u = up_factor(compensators, ranks, columns, block, v0.dtype, TILE)
            acc0 = finished(tl.dot(u, v0, acc0), TILE.ASM)
            acc1 = finished(tl.dot(u, v1, acc1), TILE.ASM)
    lane = tl.arange(0, 4)
    words = weights.packed + unit * (12 * N) + (n // 64 * 768 + n % 64 * 4)[:, None] + lane[None, :]
    mask = inside[:, None] & (lane >= 0)[None, :]
    w0 = tl.load(words, mask=mask, other=0)
    w1 = tl.load(words + 256, mask=mask, other=0)
    w2 = tl.load(words + 512, mask=mask, other=0)
    acc0 = _add_weights(acc0, weights, w0, w1, w2, unit, n, inside, N, 0, TILE)
    acc1 = _add_weights(acc1, weights, w0, w1, w2, unit, n, inside, N, 1, TILE)
    k = unit * 128 + tl.arange(0, 64)
    target = out_ptr + n[:, None].to(tl.int64) * K + k[None, :]
    tl.store(target, acc0.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (k < K)[None, :])
    tl.store(target + 64, acc1.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (k + 64 < K)[None, :])


def expand(weights: list[torch.Tensor], spec: LinearSpec, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Return W + Uᵀ·V of a dense layer, 16 bits [N, K], each value rounded once from fp32 (U and V before that).

    Args:
        weights: :class:`..layout.KernelWeights`.
        spec: of the layer.
        k: its inputs.
        dtype: fp16 or bf16.
    """
    layer, wide_k = KernelWeights(*weights), padded(k)
    widths = [padded(width) for width in spec.widths]
    mode = launch_mode(layer.packed.device, few_tokens=False)
    out = torch.empty(layer.columns, wide_k, dtype=dtype, device=layer.packed.device)
    tile = Tile(
        PARTS=len(widths),
        GROUP=layer.group_size,
        FACTOR_BITS=spec.factor_bits,
        HAS_RANK=largest_rank([spec.ranks]) > 0,
        BF16=dtype == torch.bfloat16,
        ASM=mode.asm,
        BLOCK_N=BLOCK_N,
        RANK_STEP=RANK_STEP,
        STAGES=2,
    )
    tiles = sum(cdiv(width, BLOCK_N) for width in widths)
    launch(
        _expand_kernel,
        (tiles, cdiv(wide_k, UNIT)),
        mode,
        out,
        Weights(layer.packed, layer.scale_zero, layer.exponents),
        Compensators(layer.u, layer.u_scale, layer.rank_blocks, layer.u_starts, None),
        Factor(layer.v, layer.v_scale, layer.rank_blocks),
        Shape(layer.columns, wide_k, *widths, *[0] * (MAX_PARTS - len(widths))),
        TILE=tile,
        num_warps=4,
    )
    if out.shape == (sum(spec.widths), k):
        return out
    rows = zip(out.split(widths), spec.widths, strict=True)
    return torch.cat([part[:width, :k] for part, width in rows])
