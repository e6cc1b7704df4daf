"""Lets training on a GPU give the same bytes each time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

_flash = torch.ops.aten._scaled_dot_product_flash_attention
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
MAX_HEAD = 256
"""Numbers in a head that FlashAttention takes at most."""


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Let what runs inside be differentiated with the same result each time.

    Of a training step's operations, those of fused attention (FlashAttention, memory-efficient, cuDNN's) alone add up
    gradients by atomic additions, whose order changes from run to run. FlashAttention has a form that does not, but
    PyTorch's switch for it, ``use_deterministic_algorithms``, raises in whatever other operation of a model it knows no
    deterministic form of, and wants an environment variable set before CUDA starts. So it is thrown here for the
    backward pass of attention alone. What FlashAttention cannot do (a mask, wide heads, float32) becomes plain matrix
    products and a softmax: the scores of a step are then held in memory. On CPUs nothing changes.

    Args:
        device: where the training runs.
    """
    with _Attention() if device.type == "cuda" else nullcontext():
        yield


class _Attention(TorchFunctionMode):
    """Computes attention so that its gradients are the same each time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            return _attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Return what ``scaled_dot_product_attention`` does of the same arguments."""
    head = query.shape[-1]
    fits = query.dtype in (torch.float16, torch.bfloat16) and head % 8 == 0 and head <= MAX_HEAD
    if attn_mask is not None or dropout_p or not fits or value.shape[-1] != head:
        with sdpa_kernel(SDPBackend.MATH):
            return scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
    if enable_gqa:
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    return _Flash.apply(query, key, value, is_causal, scale)


class _Flash(torch.autograd.Function):
    """FlashAttention, whose backward pass adds up gradients in a fixed order."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, causal: bool, scale: float | None) -> torch.Tensor:
        out, sums, starts, key_starts, longest, longest_key, seed, offset, _ = _flash(
            query, key, value, 0.0, causal, False, scale=scale
        )
        ctx.save_for_backward(query, key, value, out, sums, starts, key_starts, seed, offset)
        ctx.rest = (longest, longest_key, causal, scale)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        query, key, value, out, sums, starts, key_starts, seed, offset = ctx.saved_tensors
        longest, longest_key, causal, scale = ctx.rest
        lengths = (starts, key_starts, longest, longest_key)
        with _deterministic():
            found = _flash_backward(
                gradient, query, key, value, out, sums, *lengths, 0.0, causal, seed, offset, scale=scale
            )
        return *found, None, None


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
