"""Grouped GEMM of 3-bit experts over sorted token blocks, compensators added in the epilogue.

Operands are swapped: weights are the MMA's A operand (rows of outputs), tokens its B operand, since at decode
an expert has few tokens. See :mod:`.dequant` for the arithmetic and :mod:`.layout` for the weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .dequant import (
    add_group,
    codes_along_rows,
    first_pairs,
    half,
    quarter,
    scale_and_zero,
    second_pairs,
)
from .layout import UNIT, KernelExperts
from .routing import TokenBlocks


class GemmConfig(NamedTuple):
    """A tile: tokens and outputs of a block, ways K is split, warps, pipeline stages."""

    block_m: int
    block_n: int
    split_k: int
    num_warps: int
    num_stages: int


@triton.jit
def _add_up_projection(
    acc, u_ptr, u_scale_ptr, rank_begin, rank_end, expert_rank_begin, down_ptr, pairs, columns, valid,
    part_columns, num_pairs, max_rank, DOWN_SPLITS: tl.constexpr,
    FACTOR_BITS: tl.constexpr, BF16: tl.constexpr, RANK_BLOCK: tl.constexpr,
):  # fmt: skip
    """acc += Uᵀ·(V·x) for this tile: U's codes are exact operands, its scales go onto V·x before rounding."""
    for start in range(rank_begin, rank_end, RANK_BLOCK):
        rank = start + tl.arange(0, RANK_BLOCK)
        in_rank = rank < rank_end
        row = rank.to(tl.int64)
        mask = in_rank[None, :] & (columns < part_columns)[:, None]
        if FACTOR_BITS == 3:
            u = (codes_along_rows(u_ptr, row * (part_columns // 32 * 3), columns, mask) - 4).to(tl.float32)
        else:
            place = row[None, :] * part_columns + columns[:, None]
            u = tl.load(u_ptr + place, mask=mask, other=0).to(tl.float32)
        down = tl.zeros((RANK_BLOCK, pairs.shape[0]), tl.float32)
        slot = (rank - expert_rank_begin)[:, None]
        for split in tl.static_range(DOWN_SPLITS):
            source = down_ptr + (split * num_pairs + pairs)[None, :].to(tl.int64) * max_rank + slot
            down += tl.load(source, mask=in_rank[:, None] & valid[None, :], other=0.0)
        if FACTOR_BITS != 16:
            scales = u_scale_ptr + row * (part_columns // 64) + tl.min(columns, 0) // 64
            down *= tl.load(scales, mask=in_rank, other=0.0).to(tl.float32)[:, None]
        if BF16:
            acc = tl.dot(u.to(tl.bfloat16), down.to(tl.bfloat16), acc)
        else:
            acc = tl.dot(u.to(tl.float16), down.to(tl.float16), acc)
    return acc


@triton.jit
def _expert_gemm_kernel(
    x_ptr, x_sum_ptr, packed_ptr, scale_zero_ptr, u_ptr, u_scale_ptr, rank_offsets_ptr, down_ptr, out_ptr,
    sorted_pairs_ptr, block_experts_ptr, num_blocks_ptr,
    N, K, num_pairs, num_rows, top_k, max_rank,
    PARTS: tl.constexpr, GROUP: tl.constexpr, FACTOR_BITS: tl.constexpr, HAS_RANK: tl.constexpr,
    DOWN_SPLITS: tl.constexpr, BF16: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_N outputs, BLOCK_M pairs] tile of one expert, over one of SPLIT_K parts of K.

    x [num_rows, K] in 16 bits; x_sum fp32 [K/min(GROUP, 64), num_rows], sums of x over groups; pair p reads
    row p // top_k. out [SPLIT_K, num_pairs, N]. down fp32 [DOWN_SPLITS, num_pairs, max_rank], the pairs' V·x.
    """
    block = tl.program_id(1)
    if block >= tl.load(num_blocks_ptr):
        return
    split = tl.program_id(2)
    expert = tl.load(block_experts_ptr + block).to(tl.int64)
    pairs = tl.load(sorted_pairs_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
    valid = pairs < num_pairs
    rows = tl.where(valid, pairs // top_k, 0).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_safe = tl.where(n < N, n, 0)

    units = (K + 127) // 128
    begin = split * tl.cdiv(units, SPLIT_K)
    end = tl.minimum(begin + tl.cdiv(units, SPLIT_K), units)
    lane = tl.arange(0, 4)
    k64 = tl.arange(0, 64)
    k32 = tl.arange(0, 32)
    packed_ptr += (expert * units + begin) * 12 * N + n_safe[:, None] * 4 + lane[None, :]
    scale_zero_ptr += expert * (K // GROUP) * N + n_safe
    x_ptr += rows[None, :] * K
    x_sum_ptr += rows
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for unit in range(begin, end):
        w0 = tl.load(packed_ptr)
        w1 = tl.load(packed_ptr + 4 * N)
        w2 = tl.load(packed_ptr + 8 * N)
        packed_ptr += 12 * N
        a0, a1, a2, a3, a4, a5, a6, a7 = first_pairs(w0, w1, w2, BF16)
        b0, b1, b2, b3, b4, b5, b6, b7 = second_pairs(w0, w1, w2, BF16)
        k = unit * 128
        if GROUP >= 64:
            x0 = tl.load(x_ptr + (k + k64)[:, None])
            x1 = tl.load(x_ptr + (k + 64 + k64)[:, None], mask=k + 64 < K, other=0.0)
            sum0 = tl.load(x_sum_ptr + (k // 64) * num_rows)
            sum1 = tl.load(x_sum_ptr + (k // 64 + 1) * num_rows, mask=k + 64 < K, other=0.0)
            scale, zero = scale_and_zero(tl.load(scale_zero_ptr + (k // GROUP) * N))
            product = tl.dot(half(a0, a1, a2, a3, a4, a5, a6, a7, BLOCK_N), x0)
            acc = add_group(acc, product, sum0, scale, zero, 1.0, BF16)
            if GROUP == 64:
                scale, zero = scale_and_zero(tl.load(scale_zero_ptr + (k // GROUP + 1) * N, mask=k + 64 < K, other=0))
            product = tl.dot(half(b0, b1, b2, b3, b4, b5, b6, b7, BLOCK_N), x1)
            acc = add_group(acc, product, sum1, scale, zero, 8.0, BF16)
        else:
            for quarter_index in tl.static_range(4):
                kq = k + 32 * quarter_index
                inside = kq < K
                x = tl.load(x_ptr + (kq + k32)[:, None], mask=inside, other=0.0)
                sums = tl.load(x_sum_ptr + (kq // 32) * num_rows, mask=inside, other=0.0)
                scale, zero = scale_and_zero(tl.load(scale_zero_ptr + (kq // 32) * N, mask=inside, other=0))
                if quarter_index == 0:
                    a = quarter(a0, a1, a2, a3, BLOCK_N)
                elif quarter_index == 1:
                    a = quarter(a4, a5, a6, a7, BLOCK_N)
                elif quarter_index == 2:
                    a = quarter(b0, b1, b2, b3, BLOCK_N)
                else:
                    a = quarter(b4, b5, b6, b7, BLOCK_N)
                acc = add_group(acc, tl.dot(a, x), sums, scale, zero, 1.0 if quarter_index < 2 else 8.0, BF16)

    if HAS_RANK and split == 0:
        part_columns = N // PARTS
        part = tl.program_id(0) * BLOCK_N // part_columns
        slot = expert * PARTS + part
        acc = _add_up_projection(
            acc, u_ptr, u_scale_ptr,
            tl.load(rank_offsets_ptr + slot), tl.load(rank_offsets_ptr + slot + 1),
            tl.load(rank_offsets_ptr + expert * PARTS), down_ptr, pairs, n - part * part_columns, valid,
            part_columns, num_pairs, max_rank, DOWN_SPLITS, FACTOR_BITS, BF16, 16,
        )  # fmt: skip
    target = (split.to(tl.int64) * num_pairs + pairs[None, :]) * N + n[:, None]
    tl.store(out_ptr + target, acc.to(out_ptr.dtype.element_ty), mask=valid[None, :] & (n < N)[:, None])


def expert_gemm(
    x: torch.Tensor,
    x_sum: torch.Tensor,
    weights: KernelExperts,
    down: torch.Tensor | None,
    blocks: TokenBlocks,
    top_k: int,
    parts: int,
    group_size: int,
    factor_bits: int,
    config: GemmConfig,
) -> torch.Tensor:
    """Launch the grouped GEMM.

    Args:
        x: activations, fp16 or bf16 [rows, K], contiguous; pair p reads row p // top_k.
        x_sum: fp32 [K/min(group_size, 64), rows], from :func:`.compensator.group_sums`.
        weights: the experts, in the kernel layout.
        down: fp32 [splits, pairs, max_rank], from :func:`.compensator.down_project`; None without compensators.
        blocks: the sorted pairs, in blocks of ``config.block_m``.
        top_k: pairs that share a row of x.
        parts: parts of the outputs that have factors of their own (w13: 2, w2: 1).
        group_size: 32, 64 or 128.
        factor_bits: 3, 8 or 16.
        config: the tile; its block_n divides the outputs of a part.

    Returns:
        [split_k, pairs, N]: in the dtype of x if split_k is 1, else fp32 partial sums. Rows of pairs whose
        expert is not local are not written.

    Raises:
        ValueError: shapes, dtypes or the tile do not fit.
    """
    n = weights.packed.shape[3]
    rows, k = x.shape
    if x.dtype not in (torch.float16, torch.bfloat16) or not x.is_contiguous():
        raise ValueError(f"x must be contiguous fp16 or bf16, found {x.dtype} with strides {x.stride()}")
    if weights.packed.shape[1] != triton.cdiv(k, UNIT) or weights.scale_zero.shape[1] * group_size != k:
        raise ValueError(f"weights for K = {weights.scale_zero.shape[1] * group_size}, but x has {k} columns")
    if (n // parts) % config.block_n or config.block_n != 64:
        raise ValueError(f"block_n must be 64, one scale group of U, found {config.block_n}")
    if blocks.block_m != config.block_m:
        raise ValueError(f"pairs are sorted in blocks of {blocks.block_m}, the tile has {config.block_m}")
    pairs = blocks.num_pairs
    dtype = x.dtype if config.split_k == 1 else torch.float32
    out = torch.empty(config.split_k, pairs, n, dtype=dtype, device=x.device)
    grid = (n // config.block_n, blocks.experts.shape[0], config.split_k)
    _expert_gemm_kernel[grid](
        x,
        x_sum,
        weights.packed,
        weights.scale_zero,
        weights.u,
        weights.u_scale,
        weights.rank_offsets,
        down,
        out,
        blocks.pairs,
        blocks.experts,
        blocks.num_blocks,
        n,
        k,
        pairs,
        rows,
        top_k,
        0 if down is None else down.shape[2],
        PARTS=parts,
        GROUP=group_size,
        FACTOR_BITS=factor_bits,
        HAS_RANK=down is not None,
        DOWN_SPLITS=1 if down is None else down.shape[0],
        BF16=x.dtype == torch.bfloat16,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        SPLIT_K=config.split_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out
