"""Mamba-1's recurrence, whose operators vLLM's CPU build lacks, in plain PyTorch, so that tests can serve Jamba.

Over a prompt it has none; after it, one that takes a step for a whole head, as in Mamba-2. The convolution is there.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch.nn.functional import silu, softplus


def advance(
    state: torch.Tensor,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a token's output […, N] and the state […, N, S] after it, from u, delta and z […, N], B and C […, S]."""
    delta = softplus(delta)
    state = state * torch.exp(delta[..., None] * A) + (delta * u)[..., None] * B[..., None, :]
    return ((state * C[..., None, :]).sum(-1) + D * u) * silu(z), state


def _prefill(
    u: torch.Tensor,
    ssm_states: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    delta_bias: torch.Tensor,
    delta_softplus: bool,
    query_start_loc: torch.Tensor,
    cache_indices: torch.Tensor,
    has_initial_state: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """As ``selective_scan_fn`` for prompts one after another: [N, T], and the slots' states [N, S] begin or go on."""
    assert delta_softplus
    bounds, out = query_start_loc.tolist(), torch.empty_like(u)
    values = [x.float().T for x in (u, delta + delta_bias[:, None], B, C, z)]
    for index, (slot, goes_on) in enumerate(zip(cache_indices.tolist(), has_initial_state.tolist(), strict=True)):
        state = ssm_states[slot].float() if goes_on else torch.zeros_like(ssm_states[slot], dtype=torch.float32)
        for token in range(bounds[index], bounds[index + 1]):
            one, step, b, c, gate = (x[token] for x in values)
            out[:, token], state = advance(state, one, step, A, b, c, D, gate)
        ssm_states[slot] = state
    return out


def _decode(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    z: torch.Tensor,
    dt_softplus: bool,
    state_batch_indices: torch.Tensor,
    out: torch.Tensor,
    **_: Any,
) -> None:
    """As ``selective_state_update`` for a token each: [B, N], and the slots' states [N, S] go on."""
    assert dt_softplus
    slots = state_batch_indices.flatten().long()
    result, after = advance(
        state[slots].float(), x.float(), dt.float() + dt_bias, A, B.float(), C.float(), D.float(), z.float()
    )
    out.copy_(result)
    state[slots] = after.to(state.dtype)


def mend() -> None:
    """Let vLLM's CPU build compute Mamba-1."""
    if not hasattr(torch.ops._C, "selective_scan_fwd"):
        mixer: Any = importlib.import_module("vllm.model_executor.layers.mamba.mamba_mixer")
        mixer.selective_scan_fn, mixer.selective_state_update = _prefill, _decode
