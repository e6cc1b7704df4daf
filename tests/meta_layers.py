"""Layers in the kernel layout that have shapes but no memory, and other work for tests of what is launched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from random_layers import random_experts

from vllm_milo.kernels.convert import feedback, grid_fit
from vllm_milo.kernels.serving import fused_moe
from vllm_milo.kernels.serving.dense import linear, wide
from vllm_milo.kernels.serving.dense.codes import encode
from vllm_milo.kernels.serving.gemm.config import GemmConfig
from vllm_milo.kernels.serving.repack import layer
from vllm_milo.kernels.weights import LinearSpec, MoESpec


def meta_layer(
    parts: int, experts: int, n: int, k: int, group: int, bits: int, bias: bool = False
) -> list[torch.Tensor]:
    """Return a layer as :class:`vllm_milo.kernels.serving.layout.KernelWeights` holds it."""
    units = -(-k // 128)
    u, v = {3: (torch.int16, torch.int32), 8: (torch.int8, torch.int8), 16: (torch.bfloat16, torch.bfloat16)}[bits]
    tensors = {
        "packed": ((experts, units, n // 64, 3, 64, 4), torch.int32),
        "scale_zero": ((experts, units, n, 128 // group), torch.int32),
        "u": ((1,), u),
        "u_scale": ((1,), torch.float16),
        "v": ((1,), v),
        "v_scale": ((1,), torch.int32),
        "rank_blocks": ((experts * parts + 1,), torch.int32),
        "u_starts": ((experts * parts,), torch.int64),
        "norms": ((experts * parts,), torch.float32),
        "exponents": ((experts,), torch.int32),
    }
    if bias:
        tensors["bias"] = ((experts, n), torch.float32)
    return [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in tensors.values()]


def make_experts(
    experts: int,
    hidden: int,
    intermediate: int,
    ranks: Sequence[int] = (32, 16),
    groups: tuple[int, int] = (64, 64),
    bits: int = 3,
) -> tuple[MoESpec, list[torch.Tensor], list[torch.Tensor]]:
    """Return a MoE layer; ``ranks`` are the largest of an expert in both GEMMs, ``groups`` the group sizes of both."""
    spec = MoESpec(bits, "silu", False, list(ranks))
    w13 = meta_layer(2, experts, 2 * intermediate, hidden, groups[0], bits)
    return spec, w13, meta_layer(1, experts, hidden, intermediate, groups[1], bits)


def run_experts(
    tokens: int,
    experts: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    ranks: Sequence[int] = (32, 16),
    groups: tuple[int, int] = (64, 64),
    bits: int = 3,
    dtype: torch.dtype = torch.bfloat16,
    tile: GemmConfig | None = None,
) -> None:
    """Launch a layer as :func:`make_experts` makes it; ``tile`` forces that of both GEMMs."""
    spec, w13, w2 = make_experts(experts, hidden, intermediate, ranks, groups, bits)
    x = torch.empty(tokens, hidden, dtype=dtype, device="meta")
    router = torch.empty(tokens, top_k, device="meta")
    fused_moe.fused_moe(x, router, router.int(), None, w13, w2, spec, None if tile is None else (tile, tile))


def run_routed_experts(
    tokens: int, kind: torch.dtype = torch.bfloat16, padded: bool = True, experts: int = 128
) -> None:
    """Launch a layer like Qwen3-30B-A3B's that chooses experts by logits of a dtype."""
    spec, w13, w2 = make_experts(experts, 2048, 768)
    x = torch.empty(tokens, 2048, dtype=torch.bfloat16, device="meta")
    logits = torch.empty(tokens, experts, dtype=kind, device="meta")
    padding = torch.empty(tokens, dtype=torch.bool, device="meta") if padded else None
    fused_moe.routed_moe(x, logits, padding, 8, True, None, w13, w2, spec)


def run_openai_experts(tokens: int, gated: bool = True) -> None:
    """Launch a layer of gpt-oss-20b, or one of its sizes without a gate."""
    hidden, intermediate, experts, top_k = 2880, 2880, 32, 4
    own = ("silu", False, [32, 16], 7.0, 1.702, 1.0) if gated else ("relu2_no_mul", False, [32, 16])
    parts = 2 if gated else 1
    w13 = meta_layer(parts, experts, parts * intermediate, hidden, 64, 3, bias=gated)
    w2 = meta_layer(1, experts, hidden, intermediate, 64, 3, bias=gated)
    x = torch.empty(tokens, hidden, dtype=torch.bfloat16, device="meta")
    router = torch.empty(tokens, top_k, device="meta")
    fused_moe.fused_moe(x, router, router.int(), None, w13, w2, MoESpec(3, *own))


def run_dense(
    tokens: int,
    widths: list[int],
    k: int,
    rank: int,
    group: int = 64,
    bits: int = 3,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Launch a dense layer."""
    spec = LinearSpec(widths, [rank] * len(widths), group, bits)
    x = torch.empty(tokens, k, dtype=dtype, device="meta")
    linear.linear(x, meta_layer(len(widths), 1, sum(widths), k, group, bits), spec)


def run_wide(
    tokens: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16, biased: bool = False, in_codes: bool = False
) -> None:
    """Launch a dense layer that is kept in 16 bits, or in 8 too."""
    x, weight, bias = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((tokens, k), (n, k), (n,)))
    weights = [weight, *(encode(weight) if in_codes else ())]
    wide.wide_linear(x, weights, bias if biased else None)


def run_converter(group: int) -> None:
    """Launch what the converter does to [2, 256, 512], with shared moments and without any."""
    weights = torch.empty(2, 256, 512, device="meta")
    grid = [torch.empty(2, 256, 512 // group, dtype=torch.float16, device="meta") for _ in range(2)]
    codes = grid_fit.nearest_codes(weights, *grid)
    grid_fit.half_quadratic_step(weights, grid[0], grid[1].float(), 10.0, 0.7)
    for share in (None, torch.empty(1, 1, 512, device="meta")):
        grid_fit.code_sums(weights, *grid, share)
    row = torch.empty(2, 256, device="meta")
    factor = torch.empty(1, group, group, device="meta")
    feedback.quantize_group(weights[..., :group], factor, row, row, codes[..., :group])


def run_repack(group: int, bits: int) -> None:
    """Launch what brings experts into the kernel layout."""
    layer.prepare_experts(random_experts([[16, 8]], 128, 256, group, bits), bits)
