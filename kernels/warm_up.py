"""Compiles a layer's kernels ahead of its first use, many at a time and beside the reading of weights.

Triton compiles a kernel at its first use, and there are dozens, by number of tokens: otherwise the first requests, or
the capture of CUDA graphs, would wait for one after the other. Here a layer is called for many numbers of tokens while
launches are only noted, and what differs is compiled beside it (:mod:`.compiling`). A layer's weights need not be
there for that: tensors of their shapes do (:mod:`.stand_in`), so that compiling begins when a layer is made, and who
runs the first one waits for the rest (:mod:`.compiling.underway`).

What is compiled is told apart twice. Layers of equal keys (:func:`linear_key`, :func:`moe_key`) launch the same
kernels, and only the first is called: a key holds no ranks, but what kernels are compiled for of them. And of the noted
launches each is compiled once by its own key (:meth:`.launch.Launch.key`), whatever layers share it.
``VLLM_MILO_WARM_UP=0`` leaves it to the first use. Triton keeps compiled kernels on disk for the next start.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from itertools import product

import torch

from . import ops
from .compiling import underway
from .compiling.threads import Compiler, Share
from .sizes import cdiv
from .weights import LinearSpec, MoESpec, largest_rank

logger = logging.getLogger("vllm.milo")

WARM_UP_VARIABLE = "VLLM_MILO_WARM_UP"
MAX_TOKENS = 8192
"""Above this the tiles stay the same."""
Waiting = list[Future[float]]
"""What a layer's kernels are compiled by."""
_noted: dict[Hashable, Waiting] = {}
_compiler: Compiler | None = None


def compiler(share: Share | None = None) -> Compiler:
    """Return what compiles for this process, which the first call makes.

    Args:
        share: of this process among those of its host; None for all of the cores.
    """
    global _compiler
    if _compiler is None:
        _compiler = Compiler(share or Share())
    return _compiler


def wait(waiting: Waiting) -> None:
    """Wait until a layer's kernels are compiled; raises what a compilation raised."""
    for future in waiting:
        future.result()


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
) -> Waiting:
    """Begin to compile the kernels of a dense layer for up to ``max_tokens`` tokens; see :func:`.ops.linear`.

    Args:
        weights: as prepared for ``backend``, or tensors that stand in for them.
        spec: of the layer.
        backend: of the layer; nothing is done for ``torch``.
        k: inputs of the layer.
        dtype: of the activations.
        max_tokens: most tokens of a step.

    Returns:
        What :func:`wait` waits for.
    """
    device = weights[0].device

    def call(tokens: int) -> None:
        ops.linear(torch.zeros(tokens, k, dtype=dtype, device=device), weights, spec, backend)

    return _warm_up("dense layer", lambda: linear_key(weights, spec, k, dtype), call, backend, device, max_tokens)


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
    renormalizes: bool | None = None,
) -> Waiting:
    """Begin to compile the kernels of routed experts for up to ``max_tokens`` tokens; see :func:`.ops.fused_moe`.

    Args:
        w13: gate and up projections, as prepared for ``backend``, or tensors that stand in for them.
        w2: down projections, likewise.
        expert_map: global expert -> local expert or -1; None if all experts are local.
        spec: of the layer.
        backend: of the layer; nothing is done for ``torch``.
        hidden: inputs of the layer.
        experts: global number of experts.
        top_k: experts of a token.
        dtype: of the activations.
        max_tokens: most tokens of a step.
        renormalizes: of :func:`.ops.routed_moe`, where the layer is called by that; else None.

    Returns:
        What :func:`wait` waits for.
    """
    device = w13[0].device

    def call(tokens: int) -> None:
        x = torch.empty(tokens, hidden, dtype=dtype, device=device)
        if renormalizes is not None:
            rows = torch.empty(tokens, dtype=torch.bool, device=device)
            kinds = product({dtype, torch.float32}, (None, rows))
            for kind, padding in kinds if _tells_logits_apart(tokens, max_tokens) else [(dtype, None)]:
                logits = torch.empty(tokens, experts, dtype=kind, device=device)
                routing = logits, padding, top_k, renormalizes, expert_map
                ops.routed_moe(x, *routing, w13, w2, spec, backend)
            return
        pairs = torch.arange(tokens * top_k, dtype=torch.int32, device=device).view(tokens, top_k)
        router = torch.full((tokens, top_k), 1 / top_k, dtype=torch.float32, device=device)
        ops.fused_moe(x, router, pairs % experts, expert_map, w13, w2, spec, backend)

    def make_key() -> Hashable:
        return moe_key(w13, w2, expert_map, spec, top_k, dtype), renormalizes, experts

    return _warm_up("experts", make_key, call, backend, device, max_tokens)


def _tells_logits_apart(tokens: int, max_tokens: int) -> bool:
    """Return whether so many tokens are noted with each kind of logits that a router may give.

    Few tokens' logits are read by the kernel that sorts too, of which there are many. Those of more are read by one of
    their own, the same for all numbers but for how it is launched, which the powers of two and the most tokens show.
    """
    from .serving.choose import FEW_TOKENS

    return tokens <= FEW_TOKENS + 1 or tokens.bit_count() == 1 or tokens == min(max_tokens, MAX_TOKENS)


def linear_key(weights: Sequence[torch.Tensor], spec: LinearSpec, k: int, dtype: torch.dtype) -> Hashable:
    """Return what determines the kernels of a dense layer; arguments as of :func:`warm_up_linear`."""
    ranks = rank_kind(largest_rank([spec.ranks]), len(spec.widths))
    return "linear", _tensor_kinds(weights), tuple(spec.widths), ranks, spec.group_size, spec.factor_bits, k, dtype


def moe_key(
    w13: Sequence[torch.Tensor],
    w2: Sequence[torch.Tensor],
    expert_map: torch.Tensor | None,
    spec: MoESpec,
    top_k: int,
    dtype: torch.dtype,
) -> Hashable:
    """Return what determines the kernels of routed experts; arguments as of :func:`warm_up_moe`."""
    rank13, rank2 = spec.max_ranks
    ranks = rank_kind(rank13, 2), rank_kind(rank2, 1)
    own = spec.factor_bits, spec.activation, spec.router_weight_on_input, spec.limit, spec.alpha, spec.beta
    return "moe", _tensor_kinds(w13), _tensor_kinds(w2), ranks, own, expert_map is None, top_k, dtype


def rank_kind(max_rank: int, parts: int) -> Hashable:
    """Return all that kernels are compiled for of the ranks, whose largest is as :func:`.weights.largest_rank` counts.

    Their tiles decide how V·x is spread, and with it how many parts of it a GEMM adds. Their step is that of the
    up-projection. The largest rank itself is only a parameter, and always a multiple of 16.
    """
    from .serving.gemm.config import rank_step
    from .serving.projection.plan import rank_tiles

    return rank_tiles(max_rank), rank_step(max_rank, parts)


def _tensor_kinds(weights: Sequence[torch.Tensor]) -> Hashable:
    """Return what kernels are compiled for of a layer's prepared weights.

    Of the compensators that is no shape: their tensors are flat, or start with the ranks.
    """
    from .serving.layout import KernelWeights

    layer = KernelWeights(*weights)
    shapes = layer.packed.shape, layer.scale_zero.shape, layer.rank_blocks.shape
    return shapes, tuple((weight.dtype, weight.data_ptr() % 16) for weight in weights), layer.packed.device


def warm_up_repack(parts: int, group_size: int, factor_bits: int, dtype: torch.dtype, device: torch.device) -> Waiting:
    """Begin to compile what brings weights into the kernel layout.

    Args:
        parts: of an expert; 1 for dense layers, which take the same kernels.
        group_size: 32, 64 or 128.
        factor_bits: 3, 8 or 16.
        dtype: of factors of 16 bits.
        device: of the weights.
    """

    def note() -> None:
        from .serving.repack.layer import prepare_experts
        from .stand_in import smallest_experts

        prepare_experts(smallest_experts(parts, group_size, factor_bits, dtype, device), factor_bits)

    key = "repack", parts, group_size, factor_bits, dtype
    return _note(lambda: key, "repacking", note, device)


def warm_up_expand(weights: list[torch.Tensor], spec: LinearSpec, k: int, dtype: torch.dtype) -> Waiting:
    """Begin to compile what gives a dense layer's weights in 16 bits; see :func:`.ops.expand_linear`.

    Args:
        weights: as prepared for ``triton``, or tensors that stand in for them.
        spec: of the layer.
        k: inputs of the layer.
        dtype: of the activations.
    """

    def note() -> None:
        from .serving.dense.expand import expand

        expand(weights, spec, k, dtype)

    def make_key() -> Hashable:
        return "expand", linear_key(weights, spec, k, dtype)

    return _note(make_key, "weights in 16 bits", note, weights[0].device)


def warm_up_wide(n: int, k: int, dtype: torch.dtype, biased: bool, in_codes: bool, device: torch.device) -> Waiting:
    """Begin to compile what multiplies by a dense layer's weights in 16 bits; see :func:`.ops.wide_linear`.

    Args:
        n: outputs of the layer.
        k: its inputs.
        dtype: of the activations.
        biased: whether it has a bias.
        in_codes: whether it is kept in 8 bits too.
        device: of the layer.
    """

    def note() -> None:
        run_wide(n, k, dtype, biased, in_codes, device)

    return _note(lambda: ("wide", n, k, dtype, biased, in_codes), "dense layers in 16 bits and 8", note, device)


def run_wide(n: int, k: int, dtype: torch.dtype, biased: bool, in_codes: bool, device: torch.device) -> None:
    """Multiply as many tokens by weights in 16 bits as launch all kernels; the arguments are :func:`warm_up_wide`'s."""
    from .serving.dense.codes import GROUP, SCALE_DTYPE
    from .serving.dense.wide import MOST_IN_CODES, SPREAD_TILES, TILES, wide_linear
    from .stand_in import single

    weight = single((n, k), dtype, device)
    weights = [weight]
    if in_codes:
        weights += [single((n, k), torch.uint8, device), single((cdiv(k, GROUP), n), SCALE_DTYPE, device)]
    for tokens in sorted({*TILES, *SPREAD_TILES, *MOST_IN_CODES.values()}):
        wide_linear(weight.new_empty(tokens, k), weights, weight.new_empty(n) if biased else None)


def _warm_up(
    what: str,
    make_key: Callable[[], Hashable],
    call: Callable[[int], None],
    backend: str,
    device: torch.device,
    max_tokens: int,
) -> Waiting:
    """Compile what ``call`` launches for up to ``max_tokens`` tokens."""

    def note() -> None:
        for tokens in token_counts(max_tokens):
            call(tokens)

    return _note(lambda: (make_key(), max_tokens), what, note, device) if backend == "triton" else []


def _note(make_key: Callable[[], Hashable], what: str, note: Callable[[], None], device: torch.device) -> Waiting:
    """Begin to compile what ``note`` launches, unless that was done under its key; return what to wait for."""
    if device.type != "cuda" or os.environ.get(WARM_UP_VARIABLE) == "0":
        return []
    place = device, make_key()
    if place not in _noted:
        from .launch import noting

        with torch.cuda.device(device), torch.inference_mode(), noting() as launches:
            try:
                note()
            except torch.OutOfMemoryError:
                text = "MiLo found no memory to compile all kernels of its %s ahead; the rest is compiled in use"
                logger.warning(text, what)
        torch.cuda.empty_cache()
        _noted[place] = compiler().start(launches, device)
        underway.add(_noted[place])
    return _noted[place]
