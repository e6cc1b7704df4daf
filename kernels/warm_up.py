"""Compiles a layer's kernels when it is loaded, many at a time.

Triton compiles a kernel at its first use, and there are dozens, by number of tokens: otherwise the first requests, or
the capture of CUDA graphs, would wait for one after the other. Here the layer is called for many numbers of tokens
while launches are only noted, and what differs is compiled in threads. Layers of the same shape share the kernels.
``VLLM_MILO_WARM_UP=0`` leaves it to the first use. Triton keeps compiled kernels on disk for the next start.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from . import ops
from .weights import LinearSpec, MoESpec

logger = logging.getLogger("vllm.milo")

WARM_UP_VARIABLE = "VLLM_MILO_WARM_UP"
THREADS = 16
MAX_TOKENS = 8192
"""Above this the tiles stay the same."""
_done: set[Hashable] = set()


def token_counts(max_tokens: int) -> list[int]:
    """Return token counts that together launch every kernel that up to ``max_tokens`` tokens do."""
    limit = min(max_tokens, MAX_TOKENS)
    counts = {*range(1, 64), limit, *(2**exponent for exponent in range(14))}
    count = 64
    while count < limit:
        counts |= {count, count + 1}
        count += max(2, count // 16)
    return sorted(count for count in counts if count <= limit)


def warm_up_linear(
    weights: list[torch.Tensor], spec: LinearSpec, backend: str, k: int, dtype: torch.dtype, max_tokens: int
) -> None:
    """Compile the kernels of a dense layer for up to ``max_tokens`` tokens; see :func:`.ops.linear`.

    Args:
        weights: as prepared for ``backend``.
        spec: of the layer.
        backend: of the layer; nothing is done for ``torch``.
        k: inputs of the layer.
        dtype: of the activations.
        max_tokens: most tokens of a step.
    """
    device = weights[0].device

    def call(tokens: int) -> None:
        ops.linear(torch.zeros(tokens, k, dtype=dtype, device=device), weights, spec, backend)

    _warm_up("dense layer", ("linear", _key(weights, spec), k, dtype), call, backend, device, max_tokens)


def warm_up_moe(
    w13: list[torch.Tensor],
    w2: list[torch.Tensor],
    expert_map: torch.Tensor | None,
    spec: MoESpec,
    backend: str,
    hidden: int,
    experts: int,
    top_k: int,
    dtype: torch.dtype,
    max_tokens: int,
) -> None:
    """Compile the kernels of routed experts for up to ``max_tokens`` tokens; see :func:`.ops.fused_moe`.

    Args:
        w13: gate and up projections, as prepared for ``backend``.
        w2: down projections, likewise.
        expert_map: global expert -> local expert or -1; None if all experts are local.
        spec: of the layer.
        backend: of the layer; nothing is done for ``torch``.
        hidden: inputs of the layer.
        experts: global number of experts.
        top_k: experts of a token.
        dtype: of the activations.
        max_tokens: most tokens of a step.
    """
    device = w13[0].device

    def call(tokens: int) -> None:
        x = torch.zeros(tokens, hidden, dtype=dtype, device=device)
        pairs = torch.arange(tokens * top_k, dtype=torch.int32, device=device).view(tokens, top_k)
        router = torch.full((tokens, top_k), 1 / top_k, device=device)
        ops.fused_moe(x, router, pairs % experts, expert_map, w13, w2, spec, backend)

    key = ("moe", _key(w13 + w2, spec), expert_map is None, top_k, dtype)
    _warm_up("experts", key, call, backend, device, max_tokens)


def _key(weights: Sequence[torch.Tensor], spec: LinearSpec | MoESpec) -> Hashable:
    return (tuple(weight.shape for weight in weights), str(spec), weights[0].device)


def _warm_up(
    what: str, key: Hashable, call: Callable[[int], None], backend: str, device: torch.device, max_tokens: int
) -> None:
    if backend != "triton" or device.type != "cuda" or os.environ.get(WARM_UP_VARIABLE) == "0" or key in _done:
        return
    _done.add(key)
    from .launch import Launch, noting

    start = time.monotonic()

    def compile_(launch: Launch) -> None:
        with torch.cuda.device(device):  # a thread's own
            launch.compile()

    try:
        with torch.cuda.device(device), torch.inference_mode(), noting() as launches:
            for tokens in token_counts(max_tokens):
                call(tokens)
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(compile_, launches.values()))  # raises what a thread raised
    except torch.OutOfMemoryError:
        logger.warning("MiLo found no memory to compile all kernels of its %s ahead; the rest is compiled in use", what)
    torch.cuda.empty_cache()
    counted = (len(launches), what, max_tokens, time.monotonic() - start)
    logger.info("MiLo compiled %d kernels of its %s for up to %d tokens in %.1f s", *counted)
