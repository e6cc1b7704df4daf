"""Kernels of a model's layers, compiled from the moment the layers are made: beside the reading of the weights.

vLLM makes all layers, reads all files, then brings layer after layer into the kernels' layout. Its loaders keep the
parameters that they fill until they are through, whatever the version, so that bringing over a layer sooner would free
nothing; and it takes milliseconds. What takes long, the compiler, does not wait for weights at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_milo import compat
from vllm_milo.kernels import ops
from vllm_milo.kernels.compiling.threads import Share
from vllm_milo.kernels.warm_up import (
    Waiting,
    compiler,
    warm_up_expand,
    warm_up_linear,
    warm_up_moe,
    warm_up_repack,
    warm_up_wide,
)
from vllm_milo.kernels.weights import LinearSpec, MoESpec


def start_linear(
    spec: LinearSpec,
    k: int,
    dtype: torch.dtype,
    max_tokens: int,
    device: torch.device,
    wide: bool,
    in_codes: bool,
) -> Waiting:
    """Begin to compile a dense layer's kernels, if there is a GPU; return what bringing over its weights waits for.

    Args:
        spec: of the layer.
        k: its inputs on this process.
        dtype: of the activations, and of factors of 16 bits.
        max_tokens: most tokens of a step.
        device: of the layer.
        wide: whether it is kept in 16 bits.
        in_codes: whether it is in 8 bits too.
    """
    if not _compiles("linear", device):
        return []
    from vllm_milo.kernels.stand_in import stand_in

    weights = stand_in(1, spec.widths, k, spec.group_size, spec.factor_bits, dtype, device)
    repack = warm_up_repack(1, spec.group_size, spec.factor_bits, dtype, device)
    if wide:
        repack = repack + warm_up_expand(weights, spec, k, dtype)
        warm_up_wide(sum(spec.widths), k, dtype, False, in_codes, device)
    else:
        warm_up_linear(weights, spec, "triton", k, dtype, max_tokens)
    return repack


def start_gate(weight: torch.Tensor, biased: bool) -> None:
    """Begin to compile what multiplies few tokens by a router's gate, if there is a GPU.

    Args:
        weight: of the gate, [experts, hidden size], not loaded yet.
        biased: whether it has a bias.
    """
    if _compiles("linear", weight.device):
        n, k = weight.shape
        warm_up_wide(n, k, weight.dtype, biased, False, weight.device)


def start_experts(
    spec: MoESpec,
    biased: bool,
    sizes: tuple[int, int, int],
    group_sizes: Sequence[int],
    global_experts: int,
    top_k: int,
    dtype: torch.dtype,
    max_tokens: int,
    device: torch.device,
    renormalizes: bool | None,
) -> Waiting:
    """Begin to compile the kernels of a layer's experts, if there is a GPU; return what bringing them over waits for.

    Args:
        spec: of the layer.
        biased: whether experts have biases.
        sizes: experts, hidden and intermediate size, on this process.
        group_sizes: of both GEMMs.
        global_experts: number of the model's; where this process has fewer, there will be a map of them.
        top_k: experts of a token.
        dtype: of the activations, and of factors of 16 bits.
        max_tokens: most tokens of a step.
        device: of the layer.
        renormalizes: of :func:`.ops.routed_moe`, where the layer is called by that; else None.
    """
    if not _compiles("fused_moe", device):
        return []
    from vllm_milo.kernels.stand_in import stand_in

    experts, hidden, intermediate = sizes
    bits = spec.factor_bits
    parts = 2 if spec.is_gated else 1
    widths = [intermediate] * parts
    w13 = stand_in(experts, widths, hidden, group_sizes[0], bits, dtype, device, bounded=parts == 2, biased=biased)
    w2 = stand_in(experts, [hidden], intermediate, group_sizes[1], bits, dtype, device, biased=biased)
    expert_map = None
    if experts < global_experts:
        expert_map = torch.zeros(global_experts, dtype=torch.int32, device=device)
    repack = [
        future
        for number, group_size in zip((parts, 1), group_sizes, strict=True)
        for future in warm_up_repack(number, group_size, bits, dtype, device)
    ]
    sizes_of_all = hidden, global_experts, top_k
    warm_up_moe(w13, w2, expert_map, spec, "triton", *sizes_of_all, dtype, max_tokens, renormalizes)
    return repack


def _compiles(operator: str, device: torch.device) -> bool:
    """Return whether kernels of a layer on this device are compiled; makes the compiler with its share of the cores."""
    if device.type != "cuda" or ops.choose_backend(operator, device.type) != "triton":
        return False
    compiler(Share(*compat.place_on_host()))
    return True
