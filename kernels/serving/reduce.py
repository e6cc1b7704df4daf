"""What follows a GEMM: the weighted sum over top-k, and the sum of split-K parts. Fixed order, so same bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import LaunchMode, launch
from ..sizes import cdiv, next_power_of_2
from .routing import Routes, local_expert


@triton.jit(do_not_specialize=["num_pairs"])
def _weighted_sum_kernel(
    y_ptr, bias_ptr, weights_ptr, ids_ptr, map_ptr, out_ptr, H, num_pairs,
    TOP_K: tl.constexpr, SPLIT_K: tl.constexpr, WEIGHTED: tl.constexpr, HAS_MAP: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[token] = Σ weight·(y + bias) over its pairs with a local expert, y [SPLIT_K, pairs, H] as partial sums.

    Its step in :mod:`.protocol` is ``WEIGHTED_SUM``.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot
        expert = local_expert(ids_ptr, map_ptr, pair, True, HAS_MAP)
        is_local = expert >= 0
        mask = (h < H) & is_local
        value = tl.zeros((BLOCK,), tl.float32)
        for split in tl.static_range(SPLIT_K):
            value += tl.load(y_ptr + (split * num_pairs + pair) * H + h, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            value += tl.load(bias_ptr + expert.to(tl.int64) * H + h, mask=mask, other=0.0)
        if WEIGHTED:
            value *= tl.load(weights_ptr + pair).to(tl.float32)
        acc += value
    tl.store(out_ptr + token * H + h, acc.to(out_ptr.dtype.element_ty), mask=h < H)


def weighted_sum(
    y: torch.Tensor,
    bias: torch.Tensor | None,
    topk_weights: torch.Tensor,
    routes: Routes,
    weighted: bool,
    dtype: torch.dtype,
    mode: LaunchMode,
) -> torch.Tensor:
    """Return ``dtype`` [T, H]: the weighted sum of y [split_k, T·k, H] over each token's local experts.

    Rows of experts that are not local are never read: nothing wrote them. ``bias`` fp32 [E, H] is added to those of its
    expert before they are weighted.
    """
    split_k, pairs, hidden = y.shape
    tokens, top_k = routes.ids.shape
    out = torch.empty(tokens, hidden, dtype=dtype, device=y.device)
    block = 256 if tokens * hidden < 2**18 else min(1024, next_power_of_2(hidden))
    launch(
        _weighted_sum_kernel,
        (tokens, cdiv(hidden, block)),
        mode,
        y,
        bias,
        topk_weights,
        routes.ids,
        routes.expert_map,
        out,
        hidden,
        pairs,
        TOP_K=top_k,
        SPLIT_K=split_k,
        WEIGHTED=weighted,
        HAS_MAP=routes.expert_map is not None,
        HAS_BIAS=bias is not None,
        BLOCK=block,
        PDL=mode.early,
        num_warps=2 if block == 256 else 4,
    )
    return out


@triton.jit(do_not_specialize=["size"])
def _sum_splits_kernel(y_ptr, out_ptr, size, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out = Σ y over SPLIT_K parts of ``size`` values.

    Its step in :mod:`.protocol` is ``SUM_SPLITS``.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLIT_K):
        acc += tl.load(y_ptr + split * size + i, mask=i < size, other=0.0)
    tl.store(out_ptr + i, acc.to(out_ptr.dtype.element_ty), mask=i < size)


def sum_splits(y: torch.Tensor, dtype: torch.dtype, mode: LaunchMode) -> torch.Tensor:
    """Return ``dtype`` [rows, N]: the sum of the fp32 parts y [split_k, rows, N]."""
    split_k, rows, n = y.shape
    if split_k == 1:
        return y[0]
    out = torch.empty(rows, n, dtype=dtype, device=y.device)
    launch(
        _sum_splits_kernel,
        (cdiv(out.numel(), 512),),
        mode,
        y,
        out,
        out.numel(),
        SPLIT_K=split_k,
        BLOCK=512,
        PDL=mode.early,
        num_warps=4,
    )
    return out
