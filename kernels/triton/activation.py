"""The elementwise steps between and after the two expert GEMMs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _gate_up_kernel(
    y_ptr, out_ptr, size, num_pairs, ACTIVATION: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out[pair, i] = act(gate)·up, with y [SPLIT_K, pairs, 2I] as partial sums."""
    pair = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    gate = tl.zeros((BLOCK,), tl.float32)
    up = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLIT_K):
        row = y_ptr + (split * num_pairs + pair) * 2 * size
        gate += tl.load(row + i, mask=inside, other=0.0).to(tl.float32)
        up += tl.load(row + size + i, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        hidden = gate / (1.0 + tl.exp(-gate)) * up
    elif ACTIVATION == "gelu":
        hidden = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        hidden = gate * (1.0 - 1.0 / (tl.exp(2.0 * inner) + 1.0)) * up  # 0.5·(1 + tanh(inner))
    tl.store(out_ptr + pair * size + i, hidden.to(out_ptr.dtype.element_ty), mask=inside)


def gate_up(y: torch.Tensor, activation: str, dtype: torch.dtype) -> torch.Tensor:
    """Return act(gate)·up, ``dtype`` [pairs, I], of y [split_k, pairs, 2I] (gate first)."""
    split_k, pairs, both = y.shape
    out = torch.empty(pairs, both // 2, dtype=dtype, device=y.device)
    block = min(1024, triton.next_power_of_2(both // 2))
    grid = (pairs, triton.cdiv(both // 2, block))
    _gate_up_kernel[grid](y, out, both // 2, pairs, ACTIVATION=activation, SPLIT_K=split_k, BLOCK=block)
    return out


@triton.jit
def _weighted_sum_kernel(
    y_ptr, weights_ptr, local_ids_ptr, out_ptr, H, num_pairs,
    TOP_K: tl.constexpr, SPLIT_K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[token] = Σ weight·y over its pairs with a local expert, y [SPLIT_K, pairs, H] as partial sums."""
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for slot in range(TOP_K):
        pair = token * TOP_K + slot
        is_local = tl.load(local_ids_ptr + pair) >= 0
        mask = (h < H) & is_local
        value = tl.zeros((BLOCK,), tl.float32)
        for split in tl.static_range(SPLIT_K):
            value += tl.load(y_ptr + (split * num_pairs + pair) * H + h, mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights_ptr + pair).to(tl.float32)
        acc += value
    tl.store(out_ptr + token * H + h, acc.to(out_ptr.dtype.element_ty), mask=h < H)


def weighted_sum(
    y: torch.Tensor, topk_weights: torch.Tensor, local_ids: torch.Tensor, weighted: bool, dtype: torch.dtype
) -> torch.Tensor:
    """Return ``dtype`` [T, H]: the weighted sum of y [split_k, T·k, H] over each token's local experts.

    Rows of experts that are not local are never read: nothing wrote them.
    """
    split_k, pairs, hidden = y.shape
    tokens, top_k = local_ids.shape
    out = torch.empty(tokens, hidden, dtype=dtype, device=y.device)
    block = min(1024, triton.next_power_of_2(hidden))
    grid = (tokens, triton.cdiv(hidden, block))
    _weighted_sum_kernel[grid](
        y, topk_weights, local_ids, out, hidden, pairs, TOP_K=top_k, SPLIT_K=split_k, WEIGHTED=weighted, BLOCK=block
    )
    return out
