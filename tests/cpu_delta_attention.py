"""Kimi-Linear's delta attention, whose operators vLLM's CPU build lacks, in plain PyTorch, so that tests can serve it.

Of vLLM's two classes of the model, the one of NVIDIA's GPUs computes latent attention by operators of these alone, and
imports what CPUs have not; the one of AMD's takes vLLM's latent attention of every device, and is taken here.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import softplus

MODEL = "KimiLinearForCausalLM"
_LAYER = "vllm.model_executor.layers.mamba.gdn.kimi_gdn_linear_attn"
_OPERATORS = "vllm.models.kimi_k3.nvidia.ops.third_party.kda"


def step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a token's output […, H, V] and the state […, H, V, K] after it.

    Each head forgets by a gate for every key, and what a key stood for moves to v by beta […, H].
    """
    q, k = (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    state = state * gate.exp()[..., None, :]
    change = beta[..., None] * (v - (state * k[..., None, :]).sum(-1))
    state = state + change[..., None] * k[..., None, :]
    return (state * q[..., None, :]).sum(-1) * q.shape[-1] ** -0.5, state


def _gates(raw_g: torch.Tensor, A_log: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return by what exponents heads forget [T, H, K]."""
    return -A_log.float().exp()[:, None] * softplus(raw_g[0].float() + bias.view(raw_g.shape[2:]).float())


def _prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    raw_g: torch.Tensor,
    raw_beta: torch.Tensor,
    A_log: torch.Tensor,
    g_bias: torch.Tensor,
    lower_bound: None,
    initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``chunk_kda_with_fused_gate`` for prompts one after another: [1, T, H, …], and the states after each."""
    assert lower_bound is None
    gates, betas, out = _gates(raw_g, A_log, g_bias), raw_beta[0].float().sigmoid(), torch.empty_like(v)
    states = []
    for state, (start, end) in zip(initial_state.float(), pairwise(cu_seqlens.tolist()), strict=True):
        for token in range(start, end):
            one = (x[0, token].float() for x in (q, k, v))
            out[0, token], state = step(*one, gates[token], betas[token], state)
        states.append(state)
    return out, torch.stack(states).to(initial_state.dtype)


def _decode(
    mixed_qkv: torch.Tensor,
    raw_g: torch.Tensor,
    raw_beta: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    lower_bound: None,
    initial_state: torch.Tensor,
    state_indices: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``fused_recurrent_kda_packed_decode`` for a token each: [1, B, H, V], and the slots' states go on."""
    assert lower_bound is None
    slots, gates = state_indices.long(), _gates(raw_g, A_log, dt_bias)
    q, k, v = mixed_qkv.float().view(len(slots), 3, *raw_g.shape[2:]).unbind(1)
    out, state = step(q, k, v, gates, raw_beta[0].float().sigmoid(), initial_state[slots].float())
    initial_state[slots] = state.to(initial_state.dtype)
    return out[None].to(mixed_qkv.dtype), initial_state


def _initial(state: torch.Tensor, indices: torch.Tensor, has_initial_state: torch.Tensor) -> torch.Tensor:
    """As ``gather_initial_states``: the slots' states, and zeros where a prompt begins."""
    return state[indices.long()].masked_fill(~has_initial_state.view(-1, *[1] * (state.dim() - 1)), 0.0)


def __getattr__(name: str) -> Any:
    """Return the class, which imports much, once vLLM asks for it."""
    if name != MODEL:
        raise AttributeError(name)
    return _mended_model()


@cache
def _mended_model() -> Any:
    model = getattr(importlib.import_module("vllm.models.kimi_k3.amd.linear"), MODEL)
    operators: Any = importlib.import_module(_OPERATORS)
    operators.chunk_kda_with_fused_gate, operators.fused_recurrent_kda_packed_decode = _prefill, _decode
    layer: Any = importlib.import_module(_LAYER)
    layer.gather_initial_states = _initial
    if "llvmlite.binding.ffi" in sys.modules:
        _give_dict(sys.modules["llvmlite.binding.ffi"]._lib_wrapper)
    return model


def _give_dict(wrapper: Any) -> None:
    """Give objects of a class of numba, which importing the model has imported, what vLLM on CPUs looks into."""
    theirs = wrapper.__getattr__
    wrapper.__getattr__ = lambda self, name: {} if name == "__dict__" else theirs(self, name)


def mend() -> None:
    """Let vLLM's CPU build serve Kimi-Linear."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(MODEL, f"{__name__}:{MODEL}")
