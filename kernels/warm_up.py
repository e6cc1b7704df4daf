"""Compiles a layer's kernels when it is loaded, many at a time.

Triton compiles a kernel at its first use, and there are dozens, by number of tokens: otherwise the first requests, or
the capture of CUDA graphs, would wait for one after the other. Layers of the same shape share them.
``VLLM_MILO_WARM_UP=0`` leaves it to the first use. Triton keeps compiled kernels on disk for the next start.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
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


def token_waves(max_tokens: int) -> list[list[int]]:
    """Return token counts whose kernels are to be compiled, in waves that are run one after another.

    Counts of a wave lie far apart, so that few of them compile the same kernel at the same time; the first wave is
    one token alone, which sets up the device. The last is dense, and mostly finds what the others compiled.
    """
    limit = min(max_tokens, MAX_TOKENS)
    powers = [2**exponent for exponent in range(1, 14)]
    dense = {min(limit, count) for count in range(2, 64)}
    count = 64
    while count < limit:
        dense |= {count, count + 1}
        count += max(2, count // 16)
    waves = [[1], [*powers[::2], limit], powers[1::2], [3 * power // 2 for power in powers], sorted(dense)]
    return [sorted({count for count in wave if 0 < count <= limit}) for wave in waves]


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
    start = time.monotonic()
    room = _Room(2 * min(max_tokens, MAX_TOKENS))

    def run(tokens: int) -> None:
        with room.take(tokens), torch.cuda.device(device), torch.inference_mode():  # device and mode are a thread's own
            call(tokens)

    try:
        for wave in token_waves(max_tokens):
            with ThreadPoolExecutor(min(THREADS, len(wave) or 1)) as pool:
                list(pool.map(run, wave))  # raises what a thread raised
    except torch.OutOfMemoryError:
        logger.warning("MiLo found no memory to compile all kernels of its %s ahead; the rest is compiled in use", what)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    seconds = time.monotonic() - start
    logger.info("MiLo compiled the kernels of its %s for up to %d tokens in %.1f s", what, max_tokens, seconds)


class _Room:
    """Keeps threads from running more than so many tokens at once, since activations take memory."""

    def __init__(self, tokens: int) -> None:
        self._left = tokens
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, tokens: int) -> Iterator[None]:
        """Hold room for ``tokens``, which must not be more than there ever is."""
        with self._changed:
            self._changed.wait_for(lambda: self._left >= tokens)
            self._left -= tokens
        try:
            yield
        finally:
            with self._changed:
                self._left += tokens
                self._changed.notify_all()
