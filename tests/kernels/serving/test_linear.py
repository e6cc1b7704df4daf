"""The Triton path of dense layers against float64, in the interpreter (fp16) and on the GPU (fp16 and bf16)."""

from __future__ import annotations

import pytest
import torch
from random_layers import random_linear, relative_error

from vllm_milo.kernels import ops, reference
from vllm_milo.kernels.launch import noting
from vllm_milo.kernels.serving.dense import linear as dense
from vllm_milo.kernels.serving.dense.wide import multiply_wide
from vllm_milo.kernels.weights import LinearWeights

TOLERANCE = {torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
CASES = {
    # name: tokens, widths, ranks, K, group, factor bits
    "one part": (5, [128], [16], 128, 64, 3),
    "qkv": (7, [192, 64, 64], [24, 8, 0], 192, 64, 3),
    "gate_up, 8 bits": (33, [64, 64], [16, 16], 128, 64, 8),
    "16 bits": (3, [128], [40], 128, 64, 16),
    "group 32": (9, [64], [8], 64, 32, 3),
    "group 128": (40, [192], [16], 256, 128, 3),
    "no rank": (2, [64, 128], [0, 0], 128, 64, 3),
    "rank above K": (4, [64], [136], 128, 64, 3),
    "one token": (1, [320], [64], 320, 64, 3),
    "long rows": (3, [64], [16], 14336, 64, 3),
    "many tokens": (150, [128, 64], [16, 8], 192, 64, 3),
}


@pytest.fixture(params=["tiles", "expanded"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a layer multiplies: by tiles of 3 bits, or by weights in 16 bits as with very many tokens."""
    monkeypatch.setattr(dense, "MANY_TOKENS", 1 if request.param == "expanded" else 1_000_000)
    return request.param


def prepare(weights: LinearWeights, spec, device: str):
    return ops.prepare_linear(LinearWeights(*(t.to(device) for t in weights)), spec, "triton")


@pytest.mark.usefixtures("poisoned_empty", "path")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(case: str, dtype: torch.dtype, kernel_device: str):
    tokens, widths, ranks, k, group, bits = CASES[case]
    weights, spec = random_linear(widths, ranks, k, group, bits)
    x = torch.randn(tokens, k).to(dtype)
    found = ops.linear(x.to(kernel_device), prepare(weights, spec, kernel_device), spec, "triton")
    assert found.dtype == dtype
    assert found.shape == (tokens, sum(widths))
    assert relative_error(found, reference.linear(x.double(), weights, spec)) < TOLERANCE[dtype]


@pytest.mark.parametrize("tokens", [0, 3])
def test_strided_and_empty_input_of_more_dimensions(tokens: int, kernel_device: str):
    weights, spec = random_linear([128], [16], 128, 64, 3)
    x = torch.randn(2, tokens, 256).half()[..., ::2]
    found = ops.linear(x.to(kernel_device), prepare(weights, spec, kernel_device), spec, "triton")
    assert found.shape == (2, tokens, 128)
    if tokens:
        assert relative_error(found, reference.linear(x.double(), weights, spec)) < TOLERANCE[torch.float16]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [128, 16])
def test_identity_returns_the_weights(tokens: int, dtype: torch.dtype, kernel_device: str):
    """x = I: fp32(s·(q - z)) rounded once in fp16, twice where it is subnormal; in bf16 within a step.

    Or within what a tile that scales weights in fp16 rounds by, s·z to 11 bits and the rest to fp16's smallest number,
    which is up to 2^-15 of the largest s: where z is nearly a code, that is more than a step.
    """
    k = 128
    weights, spec = random_linear([192], [0], k, 64, 3)
    prepared = prepare(weights, spec, kernel_device)
    x = torch.eye(k, dtype=dtype, device=kernel_device)
    found = torch.cat([ops.linear(rows, prepared, spec, "triton") for rows in x.split(tokens)]).cpu()
    expected = reference.linear(torch.eye(k), weights, spec).to(dtype)
    if dtype == torch.float16:
        normal = expected.abs() >= 2.0**-14
        assert torch.equal(found[normal], expected[normal])
        assert float((found.float() - expected.float()).abs()[~normal].max()) <= 2.0**-24
    else:
        steps = (found.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
        scale = weights.scale.float()
        few = scale * weights.zero.float().abs() * 2.0**-11 + scale.max() * 2.0**-15
        few = few.repeat_interleave(64, 1).T
        assert not ((steps > 1) & ((found.float() - expected.float()).abs() > few)).any()


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [128, 16, 1])
def test_scales_below_the_normal_range(tokens: int, dtype: torch.dtype, kernel_device: str):
    """As tiny experts have them: subnormal fp16 numbers, none of which may be taken for 0."""
    weights, spec = random_linear([192], [0], 128, 64, 3)
    steps = torch.randint(1, 1024, weights.scale.shape)
    weights = weights._replace(scale=(steps * 2.0**-24).half(), zero=weights.zero * 0 + 3.5)
    x = torch.eye(128, dtype=dtype, device=kernel_device) * 1024
    prepared = prepare(weights, spec, kernel_device)
    found = torch.cat([ops.linear(rows, prepared, spec, "triton") for rows in x.split(tokens)])
    assert relative_error(found, reference.linear(torch.eye(128) * 1024, weights, spec)) < TOLERANCE[dtype]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 24, 130])
def test_error_is_no_larger_than_that_of_rounded_weights(tokens: int, dtype: torch.dtype, kernel_device: str):
    """Against float64 with unrounded weights, and a plain matrix product with weights rounded to ``dtype``."""
    weights, spec = random_linear([192], [0], 512, 64, 3)
    x = torch.randn(tokens, 512).to(dtype)
    exact = reference.linear(x.double(), weights, spec)
    found = ops.linear(x.to(kernel_device), prepare(weights, spec, kernel_device), spec, "triton")
    rounded = reference.dequantize(weights.packed, weights.scale, weights.zero, 64).to(dtype)
    plain = x.to(kernel_device) @ rounded.to(kernel_device).T
    assert relative_error(found, exact) < 1.5 * relative_error(plain, exact)


@pytest.mark.gpu
@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("tokens", [1, 48])
def test_opcheck_and_graph(tokens: int):
    weights, spec = random_linear([192, 64], [24, 8], 256, 64, 3)
    prepared = prepare(weights, spec, "cuda")
    x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.milo.linear.default, (x, prepared, *spec, "triton"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.linear(x, prepared, spec, "triton")
    fresh = torch.randn(tokens, 256).bfloat16()
    x.copy_(fresh)
    out.fill_(float("nan"))
    graph.replay()
    assert relative_error(out, reference.linear(fresh.double(), weights, spec)) < TOLERANCE[torch.bfloat16]


def test_very_many_tokens_expand_the_weights(monkeypatch: pytest.MonkeyPatch, kernel_device: str):
    weights, spec = random_linear([64], [16], 64, 64, 3)
    prepared, expanded, real = prepare(weights, spec, kernel_device), [], dense.expand

    def expand(*arguments):
        expanded.append(real(*arguments))
        return expanded[-1]

    monkeypatch.setattr(dense, "expand", expand)
    x = torch.randn(dense.MANY_TOKENS, 64).half()
    expected = reference.linear(x.double(), weights, spec)
    for tokens, whole in ((len(x) - 1, 0), (len(x), 1)):
        found = ops.linear(x[:tokens].to(kernel_device), prepared, spec, "triton")
        assert relative_error(found, expected[:tokens]) < TOLERANCE[torch.float16]
        assert len(expanded) == whole
    assert expanded[0].shape == (64, 64)
    assert relative_error(expanded[0], reference.linear(torch.eye(64).double(), weights, spec).T) < 1e-3


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES, "odd sizes"])
def test_expanded_weights_match_float64(case: str, dtype: torch.dtype, kernel_device: str):
    _, widths, ranks, k, group, bits = {**CASES, "odd sizes": (0, [96, 40], [8, 0], 96, 32, 16)}[case]
    weights, spec = random_linear(widths, ranks, k, group, bits)
    moved = LinearWeights(*(values.to(kernel_device) for values in weights))
    found = ops.expand_linear(moved, spec, dtype, "triton")
    assert found.is_contiguous()
    exact = reference.linear(torch.eye(k, dtype=torch.float64), weights, spec).T
    assert found.shape == exact.shape
    assert relative_error(found, exact) < TOLERANCE[dtype] / 3


def test_nothing_is_multiplied_while_launches_are_noted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *_: pytest.fail("multiplied"))
    with noting():
        assert multiply_wide(torch.zeros(5, 128), torch.zeros(192, 128)).shape == (5, 192)
