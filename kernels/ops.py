"""The operators of namespace ``milo``, for dense layers and for routed experts: a backend is chosen at load time.

Layers are prepared once for a backend (:func:`prepare_linear`, :func:`prepare_experts`), which may bring
their tensors into a layout of its own; the operators then take the prepared tensors and the backend's name,
so that a compiled graph holds the choice. Backends: ``torch`` (any device; the reference) and ``triton``.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from types import ModuleType
from typing import Any

import torch

from . import reference
from .weights import ExpertWeights, LinearSpec, LinearWeights, MoESpec

logger = logging.getLogger("vllm.milo")  # vLLM shows what is logged below "vllm"

BACKEND_VARIABLE = "VLLM_MILO_BACKEND"
BACKENDS = ("auto", "torch", "triton")

_library = torch.library.Library("milo", "DEF")
_library.define(
    "linear(Tensor x, Tensor[] weights, int[] widths, int[] ranks, int group_size, int factor_bits, "
    "str backend) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_library.define(
    "wide_linear(Tensor x, Tensor[] weights, Tensor? bias) -> Tensor", tags=(torch.Tag.needs_fixed_stride_order,)
)
_MOE_FIELDS = (
    "int factor_bits, str activation, bool router_weight_on_input, int[] max_ranks, "
    "float limit, float alpha, float beta"
)
"""Of a :class:`.weights.MoESpec`, in order."""
_library.define(
    "fused_moe(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, Tensor[] w13, Tensor[] w2, "
    f"{_MOE_FIELDS}, str backend) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_library.define(
    "routed_moe(Tensor x, Tensor logits, Tensor? padding, int top_k, bool renormalizes, Tensor? expert_map, "
    f"Tensor[] w13, Tensor[] w2, {_MOE_FIELDS}, str backend) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


@cache
def choose_backend(operator: str, device_type: str) -> str:
    """Return the backend of an operator on a device, and log the choice once.

    ``VLLM_MILO_BACKEND`` forces it; ``auto`` takes Triton on GPUs, else torch.

    Raises:
        ValueError: the variable names no backend.
    """
    wanted = os.environ.get(BACKEND_VARIABLE, "auto")
    if wanted not in BACKENDS:
        raise ValueError(f"{BACKEND_VARIABLE}={wanted!r}: must be one of {', '.join(BACKENDS)}")
    if wanted == "auto":
        wanted = "triton" if device_type == "cuda" else "torch"
    logger.info("milo::%s on %s runs on the %s backend", operator, device_type, wanted)
    return wanted


def prepare_linear(weights: LinearWeights, spec: LinearSpec, backend: str) -> list[torch.Tensor]:
    """Return a linear layer's tensors as ``backend`` takes them."""
    if backend == "triton":
        from .launch import device_of
        from .serving import layout
        from .serving.repack import layer

        with device_of(weights.packed):
            return (layer if weights.packed.is_cuda else layout).prepare_linear(weights, spec).present
    return list(weights)


def expand_linear(weights: LinearWeights, spec: LinearSpec, dtype: torch.dtype, backend: str) -> torch.Tensor:
    """Return a linear layer's weights with their compensators, W + Uᵀ·V in ``dtype`` [N, K], for a plain product.

    Args:
        weights: in the checkpoint layout.
        spec: part widths and ranks, group size, factor bits.
        dtype: of the activations; ``triton`` knows fp16 and bf16.
        backend: ``torch`` or ``triton``.
    """
    if backend == "triton":
        from .launch import device_of
        from .serving.dense import expand

        with device_of(weights.packed):
            k = weights.scale.shape[1] * spec.group_size
            return expand.expand(prepare_linear(weights, spec, backend), spec, k, dtype)
    return reference.expand_linear(weights, spec, dtype)


def streams(outputs: int, inputs: int, device: torch.device, in_codes: bool = False) -> bool:
    """Return whether :func:`wide_linear` multiplies few tokens on a GPU by a kernel of ours; only ``triton`` does.

    Args:
        outputs: of the layer.
        inputs: likewise.
        device: the GPU.
        in_codes: whether the layer is there in 8 bits too, and these are meant.
    """
    from .serving.dense.wide import wide_tile

    return wide_tile(1, outputs, inputs, device, in_codes) is not None


def encode_linear(wide: torch.Tensor) -> tuple[list[torch.Tensor], float]:
    """Return a layer in 16 bits once more in 8, for ``triton``, and its error, as of :mod:`.serving.dense.codes`."""
    from .serving.dense import codes

    encoded = codes.encode(wide)
    return list(encoded), codes.error(wide, *encoded)


def prepare_experts(weights: ExpertWeights, spec: MoESpec, backend: str) -> list[torch.Tensor]:
    """Return one expert GEMM's tensors as ``backend`` takes them."""
    if backend == "triton":
        from .launch import device_of
        from .serving import layout
        from .serving.repack import layer

        with device_of(weights.packed):
            return (layer if weights.packed.is_cuda else layout).prepare_experts(weights, spec.factor_bits).present
    return weights.present


def find_tiles(
    w13: list[torch.Tensor], w2: list[torch.Tensor], spec: MoESpec, top_k: int, dtype: torch.dtype, backend: str
) -> None:
    """Look for tuned tiles of routed experts: the log says which are used, and a broken file is an error at once.

    Args:
        w13: gate and up projections, as prepared for ``backend``.
        w2: down projections, likewise.
        spec: of the layer.
        top_k: experts of a token.
        dtype: of the activations.
        backend: of the layer; only ``triton`` has tiles.

    Raises:
        ValueError: a file of tiles is broken, or made by another version; the message names it.
    """
    if backend == "triton":
        from . import tuned
        from .serving.fused_moe import moe_shape
        from .serving.layout import KernelWeights

        tuned.find(moe_shape(KernelWeights(*w13), KernelWeights(*w2), spec, top_k), 1, w13[0].device, dtype)


def linear(x: torch.Tensor, weights: list[torch.Tensor], spec: LinearSpec, backend: str) -> torch.Tensor:
    """Return x·Wᵀ + (x·Vᵀ)·U, [..., K] -> [..., N]; see :func:`.reference.linear`.

    Args:
        x: activations.
        weights: what :func:`prepare_linear` returned for ``backend``.
        spec: part widths and ranks, group size, factor bits.
        backend: ``torch`` or ``triton``.
    """
    return torch.ops.milo.linear(x, weights, *spec, backend)


def wide_linear(x: torch.Tensor, weights: list[torch.Tensor], bias: torch.Tensor | None, backend: str) -> torch.Tensor:
    """Return x·Wᵀ + bias of a layer that is kept in 16 bits, [..., K] -> [..., N].

    Args:
        x: activations; ``triton`` knows fp16 and bf16.
        weights: what :func:`expand_linear` returned, and for ``triton`` what :func:`encode_linear` made of it, or not.
        bias: [N], or None.
        backend: ``torch`` or ``triton``.
    """
    if backend == "triton":
        return torch.ops.milo.wide_linear(x, weights, bias)
    return torch.nn.functional.linear(x, weights[0], bias)


def fused_moe(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    w13: list[torch.Tensor],
    w2: list[torch.Tensor],
    spec: MoESpec,
    backend: str,
) -> torch.Tensor:
    """Return the routed experts' weighted sum, [T, H] -> [T, H]; see :func:`.reference.fused_moe`.

    Args:
        x: activations.
        topk_weights: router weights [T, k].
        topk_ids: global expert ids [T, k].
        expert_map: global expert -> local expert or -1; None if all experts are local.
        w13: gate and up projections, or up alone, as :func:`prepare_experts` returned them for ``backend``.
        w2: down projections, likewise.
        spec: factor bits, activation and its constants, where the router weight applies, largest ranks.
        backend: ``torch`` or ``triton``.
    """
    return torch.ops.milo.fused_moe(x, topk_weights, topk_ids, expert_map, w13, w2, *spec, backend)


def routed_moe(
    x: torch.Tensor,
    logits: torch.Tensor,
    padding: torch.Tensor | None,
    top_k: int,
    renormalizes: bool,
    expert_map: torch.Tensor | None,
    w13: list[torch.Tensor],
    w2: list[torch.Tensor],
    spec: MoESpec,
    backend: str,
) -> torch.Tensor:
    """Return the weighted sum of the experts that a router's logits choose, [T, H] -> [T, H].

    The experts are the largest of a softmax over the logits, the first of equals first (:func:`.reference.choose`).

    Args:
        x: activations.
        logits: of the router, [T, global experts].
        padding: bool [T], rows that are no token's and give 0; None if all are tokens.
        top_k: experts of a token.
        renormalizes: whether a token's weights sum to 1; else they are its softmax over all experts.
        expert_map: as for :func:`fused_moe`, as are the arguments that follow.
        w13: gate and up projections.
        w2: down projections.
        spec: of the layer.
        backend: ``torch`` or ``triton``.
    """
    return torch.ops.milo.routed_moe(x, logits, padding, top_k, renormalizes, expert_map, w13, w2, *spec, backend)


def _linear(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    widths: list[int],
    ranks: list[int],
    group_size: int,
    factor_bits: int,
    backend: str,
) -> torch.Tensor:
    spec = LinearSpec(widths, ranks, group_size, factor_bits)
    if backend == "triton":
        from .compiling.underway import settle
        from .launch import device_of
        from .serving.dense import linear as triton_linear

        settle()
        with device_of(x):
            return triton_linear.linear(x, weights, spec)
    return reference.linear(x, LinearWeights(*weights), spec)


def _linear_fake(x: torch.Tensor, weights: list[torch.Tensor], widths: list[int], *_: object) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], sum(widths))


def _wide_linear(x: torch.Tensor, weights: list[torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
    from .compiling.underway import settle
    from .launch import device_of
    from .serving.dense import wide

    settle()
    with device_of(x):
        return wide.wide_linear(x, weights, bias)


def _wide_linear_fake(x: torch.Tensor, weights: list[torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weights[0].shape[0])


def _experts_on_triton() -> ModuleType:
    """Return what has the layers of routed experts: those that are launched, or those whose launches are recorded."""
    from .replaying import experts, recording
    from .serving import fused_moe as direct

    return experts if recording.is_wanted() else direct


def _fused_moe(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    w13: list[torch.Tensor],
    w2: list[torch.Tensor],
    *fields_and_backend: Any,
) -> torch.Tensor:
    *fields, backend = fields_and_backend
    spec = MoESpec(*fields)
    if backend == "triton":
        from .compiling.underway import settle
        from .launch import device_of

        settle()
        layer = _experts_on_triton()
        with device_of(x):
            return layer.fused_moe(x, topk_weights, topk_ids, expert_map, w13, w2, spec)
    return reference.fused_moe(x, topk_weights, topk_ids, expert_map, ExpertWeights(*w13), ExpertWeights(*w2), spec)


def _routed_moe(
    x: torch.Tensor,
    logits: torch.Tensor,
    padding: torch.Tensor | None,
    top_k: int,
    renormalizes: bool,
    expert_map: torch.Tensor | None,
    w13: list[torch.Tensor],
    w2: list[torch.Tensor],
    *fields_and_backend: Any,
) -> torch.Tensor:
    *fields, backend = fields_and_backend
    if backend == "triton":
        from .compiling.underway import settle
        from .launch import device_of

        settle()
        layer, routing = _experts_on_triton(), (logits, padding, top_k, renormalizes, expert_map)
        with device_of(x):
            return layer.routed_moe(x, *routing, w13, w2, MoESpec(*fields))
    weights, ids = reference.choose(logits, padding, top_k, renormalizes)
    return _fused_moe(x, weights, ids, expert_map, w13, w2, *fields_and_backend)


def _fused_moe_fake(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x)


_library.impl("linear", _linear, "CompositeExplicitAutograd")
_library.impl("wide_linear", _wide_linear, "CompositeExplicitAutograd")
_library.impl("fused_moe", _fused_moe, "CompositeExplicitAutograd")
_library.impl("routed_moe", _routed_moe, "CompositeExplicitAutograd")
torch.library.register_fake("milo::linear", _linear_fake, lib=_library)
torch.library.register_fake("milo::wide_linear", _wide_linear_fake, lib=_library)
torch.library.register_fake("milo::fused_moe", _fused_moe_fake, lib=_library)
torch.library.register_fake("milo::routed_moe", _fused_moe_fake, lib=_library)
