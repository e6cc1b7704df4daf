"""Sizes that tensor parallelism leaves: any multiple of 32, against float64, with NaN behind every tensor.

What is read beyond a row finds the next one, beyond the last row NaN; what nothing writes is NaN too.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import NamedTuple

import pytest
import torch
from random_layers import exact_moe, moe_spec, random_experts, random_linear, random_routing, relative_error

from vllm_milo.checkpoint import CompensatorFormat
from vllm_milo.kernels import ops, reference
from vllm_milo.kernels.weights import ExpertWeights, LinearWeights

TOLERANCE = {torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]  # bf16 dots are wrong interpreted
GUARD = 4096
"""Elements on each side of a tensor."""
NANS = 0x7E00
"""fp16 NaN, which scales and zero points are in the halves of 32-bit words."""
GUARDS = {torch.int32: NANS << 16 | NANS, torch.int16: NANS, torch.int8: 127, torch.int64: 2**40}


def guarded(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """The tensor on a device, between elements that are no numbers."""
    flat = torch.full((tensor.numel() + 2 * GUARD,), GUARDS.get(tensor.dtype, float("nan")), dtype=tensor.dtype)
    flat[GUARD:-GUARD] = tensor.flatten()
    return flat.to(device)[GUARD:-GUARD].view(tensor.shape)


class Dense(NamedTuple):
    tokens: int
    widths: list[int]
    k: int
    ranks: list[int]
    group: int
    bits: int


def check_dense(case: Dense, dtype: torch.dtype, device: str) -> None:
    """The rows of x are one after another; the next one's are the first that a read too far finds."""
    weights, spec = random_linear(case.widths, case.ranks, case.k, case.group, case.bits)
    x = torch.randn(case.tokens, case.k).to(dtype)
    own = LinearWeights(*(guarded(tensor, device) for tensor in weights))
    prepared = [guarded(tensor, device) for tensor in ops.prepare_linear(own, spec, "triton")]
    found = ops.linear(guarded(x, device), prepared, spec, "triton")
    assert found.shape == (case.tokens, sum(case.widths))
    assert found.is_contiguous()
    assert relative_error(found, reference.linear(x.double(), weights, spec)) < TOLERANCE[dtype], case


class Routed(NamedTuple):
    tokens: int
    hidden: int
    intermediate: int
    ranks: tuple[int, int, int]
    groups: tuple[int, int]
    bits: int
    activation: str = "silu"


def check_experts(case: Routed, dtype: torch.dtype, device: str) -> None:
    """Three experts, two a token; the second has no compensators."""
    gate, up, down = case.ranks
    ranks13, ranks2 = [[gate, up], [0, 0], [up, gate]], [[down], [0], [down]]
    w13 = random_experts(ranks13, 2 * case.intermediate, case.hidden, case.groups[0], case.bits)
    w2 = random_experts(ranks2, case.hidden, case.intermediate, case.groups[1], case.bits)
    spec = moe_spec(ranks13, ranks2, case.bits, case.activation)
    prepared = []
    for gemm in (w13, w2):
        own = ExpertWeights(*(guarded(tensor, device) for tensor in gemm.present))
        prepared.append([guarded(tensor, device) for tensor in ops.prepare_experts(own, spec, "triton")])
    x = torch.randn(case.tokens, case.hidden).to(dtype)
    router, ids = random_routing(case.tokens, 2, 3)
    on_device = (guarded(tensor, device) for tensor in (x, router, ids))
    found = ops.fused_moe(*on_device, None, *prepared, spec, "triton")
    assert found.shape == x.shape
    assert found.is_contiguous()
    exact = exact_moe(x, router, ids, dict(enumerate(range(3))), w13, w2, spec)
    assert relative_error(found, exact) < TOLERANCE[dtype], case


DENSE = [
    Dense(5, [64], 32, [0], 32, 3),
    Dense(5, [128], 96, [8], 32, 16),
    Dense(3, [64], 160, [24], 32, 16),
    Dense(5, [128], 352, [0], 32, 3),
    Dense(40, [64], 352, [16], 32, 16),
    Dense(2, [64], 1056, [16], 32, 16),
    Dense(5, [96], 128, [0], 64, 3),
    Dense(5, [96], 128, [16], 128, 16),
    Dense(70, [96, 160], 128, [8, 24], 64, 16),
    Dense(3, [96, 32, 32], 96, [16, 8, 0], 32, 16),
    Dense(1, [80, 16, 16], 64, [16, 0, 8], 64, 16),  # heads of 80 and of 16: no multiple of 32
    Dense(4, [1056], 64, [16], 32, 16),
    Dense(2, [128, 80], 64, [8, 0], 64, 3),
    Dense(3, [192, 64], 192, [16, 8], 64, 8),
]


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", DENSE, ids=str)
def test_dense_layers(case: Dense, dtype: torch.dtype, kernel_device: str):
    check_dense(case, dtype, kernel_device)


EXPERTS = [
    Routed(5, 64, 32, (0, 0, 0), (32, 32), 3),
    Routed(5, 64, 96, (16, 8, 8), (32, 32), 16),
    Routed(5, 128, 352, (0, 0, 0), (64, 32), 3),
    Routed(7, 128, 352, (8, 24, 16), (32, 32), 16),
    Routed(40, 64, 160, (24, 0, 0), (64, 32), 16, "gelu_tanh"),
    Routed(90, 64, 96, (0, 16, 24), (64, 32), 16),
    Routed(3, 96, 64, (16, 8, 8), (32, 64), 16),  # vLLM cuts no hidden size, but the operator takes it
    Routed(3, 192, 192, (16, 8, 8), (64, 64), 8),
]


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", EXPERTS, ids=str)
def test_experts(case: Routed, dtype: torch.dtype, kernel_device: str):
    check_experts(case, dtype, kernel_device)


SIZES = [*range(32, 513, 32), 1056]
EVERY = list(itertools.product((32, 64, 128), (3, 8, 16), (0, 8, 16, 24)))
"""Group sizes, bits, ranks."""
ROWS = (1, 20, 40, 150)


def takes(n: int, k: int, group: int, bits: int, rank: int) -> bool:
    """Whether the plugin admits such a part of a matrix."""
    of_n, of_k = CompensatorFormat(bits).split_multiples(group, rank > 0)
    return n % of_n == 0 and k % of_k == 0


@pytest.mark.parametrize("size", SIZES)
def test_what_the_plugin_refuses_the_kernels_refuse(size: int):
    """Factors in integers, which have a scale for 64 values; groups that are cut are no layers at all."""
    for (group, bits, rank), (n, k) in itertools.product(EVERY, ((size, 128), (64, size))):
        if k % group:
            continue
        refused = contextlib.nullcontext()
        if not takes(n, k, group, bits, rank):
            refused = pytest.raises(ValueError, match=f"found {n} and {k}")
        with refused:
            ops.prepare_linear(*random_linear([n], [rank], k, group, bits), "triton")
        spec = moe_spec([[rank] * 2], [[rank]], bits)
        with refused:
            ops.prepare_experts(random_experts([[rank] * 2], 2 * n, k, group, bits), spec, "triton")


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("size", SIZES)
def test_every_dense_size(size: int):
    """As K and as N of one part and of two, in every format that can hold it."""
    tokens = itertools.cycle(ROWS)
    for (group, bits, rank), dtype in itertools.product(EVERY, TOLERANCE):
        shapes = (
            ([size], 256, [rank]),
            ([size, 64], 128, [rank, 8]),
            ([128], size, [rank]),
            ([64, size], size, [8, rank]),
        )
        for widths, k, ranks in shapes:
            if all(takes(n, k, group, bits, rank) for n, rank in zip(widths, ranks, strict=True)):
                check_dense(Dense(next(tokens), widths, k, ranks, group, bits), dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("size", SIZES)
def test_every_intermediate_size(size: int):
    """As N of the first GEMM and K of the second, whose groups may differ."""
    tokens = itertools.cycle(ROWS)
    for (group, bits, rank), dtype, first in itertools.product(EVERY, TOLERANCE, (32, 64, 128)):
        if takes(size, 128, first, bits, rank) and takes(128, size, group, bits, rank):
            ranks = (rank, 8 if rank else 0, rank)
            check_experts(Routed(next(tokens), 128, size, ranks, (first, group), bits), dtype, "cuda")
