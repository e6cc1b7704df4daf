"""Ling-2.5's linear attention, whose operators vLLM's CPU build lacks, in plain PyTorch, so that tests can serve it."""

from __future__ import annotations

import importlib
from typing import Any

import torch

_LINEAR = "vllm.model_executor.layers.mamba.linear"


def step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slope: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a token's output [H, D] and the state [H, D, D] after it, from q, k and v [H, D]: each head forgets."""
    state = state * torch.exp(-slope.flatten())[:, None, None] + k[:, :, None].float() * v[:, None, :].float()
    return torch.einsum("hd,hde->he", q.float(), state), state


def normed(
    x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor | None, eps: float, group_size: int | None
) -> torch.Tensor:
    """Return the RMS norm of groups of x [T, …, N], times weight [N] and the sigmoid of the gate."""
    groups = x.float().unflatten(-1, (-1, group_size or x.shape[-1]))
    groups = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + eps)
    out = groups.flatten(-2) * weight.float()
    return (out if gate is None else out * torch.sigmoid(gate.float())).to(x.dtype)


def _prefill(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slope: torch.Tensor, kv_history: torch.Tensor, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``lightning_attention``: [1, H, T, D], and the state in the last place of [1, H, 1, D, D]."""
    state, outputs = kv_history[0].float(), []
    for index in range(q.shape[2]):
        out, state = step(q[0, :, index], k[0, :, index], v[0, :, index], slope, state)
        outputs.append(out)
    return torch.stack(outputs, 1)[None].to(q.dtype), state[None, :, None]


def _decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    caches: torch.Tensor,
    slope: torch.Tensor,
    slots: torch.Tensor,
    *_: Any,
) -> torch.Tensor:
    """As ``linear_decode_forward_triton``: [B, H, 1, D] becomes [B, H·D], and the slots' states go on."""
    outputs = []
    for index, slot in enumerate(slots.flatten().tolist()):
        out, state = step(q[index, :, 0], k[index, :, 0], v[index, :, 0], slope, caches[slot].float())
        caches[slot] = state
        outputs.append(out.flatten())
    return torch.stack(outputs).to(q.dtype)


def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: None, eps: float, is_rms_norm: bool) -> torch.Tensor:
    """As ``layernorm_fn`` for queries and keys [T, H, D]."""
    assert bias is None
    assert is_rms_norm
    return normed(x, weight, None, eps, None)


def mend() -> None:
    """Let vLLM's CPU build compute Ling-2.5's linear attention."""
    ling: Any = importlib.import_module(f"{_LINEAR}.bailing_linear_attn")
    minimax: Any = importlib.import_module(f"{_LINEAR}.minimax_linear_attn")
    minimax.lightning_attention, minimax.linear_decode_forward_triton = _prefill, _decode
    ling.layernorm_fn = _layer_norm
    # vLLM splits blocks of the hybrid cache, which are of 128 tokens beside latent attention, into those of its kernel
    latent: Any = importlib.import_module("vllm.v1.attention.backends.mla.cpu_mla").CPUMLABackend
    latent.supports_block_size = classmethod(lambda _, block_size: block_size is None or block_size % 16 == 0)
    ling.BailingGroupRMSNormGate.forward = lambda self, x, z=None: normed(x, self.weight, z, self.eps, self.group_size)
