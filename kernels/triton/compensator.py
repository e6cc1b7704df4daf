"""What the GEMM needs of its input before it starts: sums over groups, and the down-projection V·x."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .dequant import add_group, first_pairs, half, second_pairs
from .layout import KernelExperts
from .routing import TokenBlocks

_RANK_BLOCK = 16


@triton.jit
def _group_sums_kernel(x_ptr, out_ptr, K, num_rows, SIZE: tl.constexpr, GROUPS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    k = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out_ptr + group * num_rows + row, tl.sum(x, 1), mask=group < K // SIZE)


def group_sums(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return fp32 [K/g, rows]: the sums of x [rows, K] over consecutive g = min(group_size, 64) columns."""
    rows, k = x.shape
    size = min(group_size, 64)
    out = torch.empty(k // size, rows, dtype=torch.float32, device=x.device)
    groups = 16
    _group_sums_kernel[(rows, triton.cdiv(k // size, groups))](x, out, k, rows, SIZE=size, GROUPS=groups)
    return out


@triton.jit
def _down_project_kernel(
    x_ptr, x_sum_ptr, v_ptr, v_scale_ptr, rank_offsets_ptr, out_ptr,
    sorted_pairs_ptr, block_experts_ptr, num_blocks_ptr,
    K, num_pairs, num_rows, top_k, total_rank, max_rank,
    PARTS: tl.constexpr, FACTOR_BITS: tl.constexpr, BF16: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, RANK_BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """V·x of one block of pairs and RANK_BLOCK ranks of its expert, all parts, over one of SPLITS parts of K."""
    block = tl.program_id(1)
    if block >= tl.load(num_blocks_ptr):
        return
    split = tl.program_id(2)
    expert = tl.load(block_experts_ptr + block)
    begin = tl.load(rank_offsets_ptr + expert * PARTS)
    end = tl.load(rank_offsets_ptr + expert * PARTS + PARTS)
    slot = tl.program_id(0) * RANK_BLOCK + tl.arange(0, RANK_BLOCK)
    if begin + tl.program_id(0) * RANK_BLOCK >= end:
        return
    in_rank = begin + slot < end
    rank = tl.where(in_rank, begin + slot, begin).to(tl.int64)
    pairs = tl.load(sorted_pairs_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
    valid = pairs < num_pairs
    rows = tl.where(valid, pairs // top_k, 0).to(tl.int64)

    units = (K + 127) // 128
    unit_begin = split * tl.cdiv(units, SPLITS)
    unit_end = tl.minimum(unit_begin + tl.cdiv(units, SPLITS), units)
    k64 = tl.arange(0, 64)
    x_ptr += rows[None, :] * K
    x_sum_ptr += rows
    if FACTOR_BITS == 3:
        v_ptr += unit_begin.to(tl.int64) * 12 * total_rank + rank[:, None] * 4 + tl.arange(0, 4)[None, :]
    zero = tl.full((RANK_BLOCK,), 4.0, tl.float32)
    acc = tl.zeros((RANK_BLOCK, BLOCK_M), tl.float32)
    for unit in range(unit_begin, unit_end):
        if FACTOR_BITS == 3:
            w0 = tl.load(v_ptr)
            w1 = tl.load(v_ptr + 4 * total_rank)
            w2 = tl.load(v_ptr + 8 * total_rank)
            v_ptr += 12 * total_rank
        for part in tl.static_range(2):
            k = unit * 128 + part * 64
            inside = k < K
            x = tl.load(x_ptr + (k + k64)[:, None], mask=inside, other=0.0)
            if FACTOR_BITS == 3:
                scale = tl.load(v_scale_ptr + (k // 64) * total_rank + rank, mask=inside, other=0.0).to(tl.float32)
                sums = tl.load(x_sum_ptr + (k // SUMS) * num_rows, mask=inside, other=0.0)
                if SUMS == 32:
                    sums += tl.load(x_sum_ptr + (k // SUMS + 1) * num_rows, mask=inside, other=0.0)
                if part == 0:
                    p0, p1, p2, p3, p4, p5, p6, p7 = first_pairs(w0, w1, w2, BF16)
                else:
                    p0, p1, p2, p3, p4, p5, p6, p7 = second_pairs(w0, w1, w2, BF16)
                product = tl.dot(half(p0, p1, p2, p3, p4, p5, p6, p7, RANK_BLOCK), x)
                acc = add_group(acc, product, sums, scale, zero, 1.0 if part == 0 else 8.0, BF16)
            else:
                v = tl.load(v_ptr + rank[:, None] * K + (k + k64)[None, :], mask=inside, other=0)
                product = tl.dot(v.to(x.dtype), x)
                if FACTOR_BITS == 8:
                    scale = tl.load(v_scale_ptr + (k // 64) * total_rank + rank, mask=inside, other=0.0)
                    product *= scale.to(tl.float32)[:, None]
                acc += product
    target = (split.to(tl.int64) * num_pairs + pairs[None, :]) * max_rank + slot[:, None]
    tl.store(out_ptr + target, acc, mask=in_rank[:, None] & valid[None, :])


def down_project(
    x: torch.Tensor,
    x_sum: torch.Tensor,
    weights: KernelExperts,
    blocks: TokenBlocks,
    top_k: int,
    parts: int,
    group_size: int,
    factor_bits: int,
    max_rank: int,
    splits: int,
) -> torch.Tensor | None:
    """Return V·x of every pair, fp32 [splits, pairs, max_rank]; None if no expert has rank.

    Part p's ranks follow part p-1's; what lies beyond an expert's ranks is not written. The caller adds the
    splits. Arguments as in :func:`.expert_gemm.expert_gemm`; ``max_rank`` is the largest rank of an expert, its
    parts added.
    """
    if max_rank == 0:
        return None
    rows, k = x.shape
    out = torch.empty(splits, blocks.num_pairs, max_rank, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(max_rank, _RANK_BLOCK), blocks.experts.shape[0], splits)
    _down_project_kernel[grid](
        x,
        x_sum,
        weights.v,
        weights.v_scale,
        weights.rank_offsets,
        out,
        blocks.pairs,
        blocks.experts,
        blocks.num_blocks,
        k,
        blocks.num_pairs,
        rows,
        top_k,
        weights.u.shape[0],
        max_rank,
        PARTS=parts,
        FACTOR_BITS=factor_bits,
        BF16=x.dtype == torch.bfloat16,
        SUMS=min(group_size, 64),
        BLOCK_M=blocks.block_m,
        RANK_BLOCK=_RANK_BLOCK,
        SPLITS=splits,
        num_warps=4,
        num_stages=3,
    )
    return out
