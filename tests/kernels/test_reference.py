"""The torch operators against dense float64 algebra, and as torch.library citizens."""

from __future__ import annotations

import itertools

import pytest
import torch
from random_layers import (
    exact_moe,
    moe_spec,
    random_experts,
    random_linear,
    random_routing,
    relative_error,
)

from vllm_milo.kernels import ops
from vllm_milo.kernels.packing import dequantize, dequantize_factor
from vllm_milo.kernels.reference import ACTIVATIONS, expert_gemm, fused_moe, linear
from vllm_milo.kernels.weights import factor_elements

R13, R2 = [[8, 16], [0, 24], [0, 0]], [[16], [0], [8]]


def dense_matrix(weights, spec) -> torch.Tensor:
    """s·(q - z) + UᵀV in float64, written out part by part."""
    matrix = dequantize(weights.packed, weights.scale, weights.zero, spec.group_size, torch.float64)
    row, rank_row, u_start, scale_start = 0, 0, 0, 0
    for width, rank in zip(spec.widths, spec.ranks, strict=True):
        if rank:
            size, scales = rank * factor_elements(width, spec.factor_bits), rank * width // 64
            u = weights.u[u_start : u_start + size].view(rank, -1)
            u_scale = weights.u_scale[scale_start : scale_start + scales].view(rank, -1)
            v, v_scale = weights.v[rank_row : rank_row + rank], weights.v_scale[rank_row : rank_row + rank]
            up, down = (
                dequantize_factor(
                    factor, None if spec.factor_bits == 16 else scale, spec.factor_bits, dtype=torch.float64
                )
                for factor, scale in ((u, u_scale), (v, v_scale))
            )
            matrix[row : row + width] += up.T @ down
            u_start, scale_start = u_start + size, scale_start + (scales if spec.factor_bits != 16 else 0)
        row, rank_row = row + width, rank_row + rank
    return matrix


@pytest.mark.parametrize("bits", [3, 8, 16])
@pytest.mark.parametrize("ranks", [[0, 0, 0], [16, 8, 0], [0, 24, 8]])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_linear(bits, ranks, group):
    weights, spec = random_linear([256, 64, 128], ranks, 128, group, bits)
    x = torch.randn(2, 3, 128, dtype=torch.float64)
    expected = x @ dense_matrix(weights, spec).T
    assert relative_error(linear(x, weights, spec), expected) < 1e-12
    assert relative_error(linear(x.float(), weights, spec), expected) < 1e-5
    for dtype, limit in ((torch.bfloat16, 6e-3), (torch.float16, 8e-4)):
        found = linear(x.to(dtype), weights, spec)
        assert found.dtype == dtype
        assert relative_error(found, x.to(dtype).double() @ dense_matrix(weights, spec).T) < limit


def make_moe(bits=3, activation="silu", on_input=False, groups=(64, 64)):
    spec = moe_spec(R13, R2, bits, activation, on_input)
    return random_experts(R13, 128, 128, groups[0], bits), random_experts(R2, 128, 64, groups[1], bits), spec


@pytest.mark.parametrize(("bits", "group"), [(3, 64), (8, 64), (16, 64), (3, 32), (3, 128)])
def test_expert_gemm_is_the_dense_matrix(bits, group):
    w13, _, spec = make_moe(bits, groups=(group, 32))
    eye = torch.eye(128, dtype=torch.float64)
    for expert in range(3):
        found = expert_gemm(eye, w13, expert, spec).T
        base = dequantize(w13.packed[expert], w13.scale[expert], w13.zero[expert], group, torch.float64)
        bounds = w13.rank_offsets.tolist()[2 * expert : 2 * expert + 3]
        for part, (begin, end) in enumerate(itertools.pairwise(bounds)):
            scales = (None, None) if bits == 16 else (w13.u_scale[begin:end], w13.v_scale[begin:end])
            u = dequantize_factor(w13.u[begin:end], scales[0], bits, dtype=torch.float64)
            v = dequantize_factor(w13.v[begin:end], scales[1], bits, dtype=torch.float64)
            base[64 * part : 64 * part + 64] += u.T @ v
        assert relative_error(found, base) < 1e-12


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("groups", [(64, 64), (128, 32)])
def test_fused_moe(activation, on_input, groups):
    w13, w2, spec = make_moe(activation=activation, on_input=on_input, groups=groups)
    x = torch.randn(9, 128)
    weights, ids = random_routing(9, 2, 3)
    ids[4] = -1
    expected = exact_moe(x, weights, ids, {0: 0, 1: 1, 2: 2}, w13, w2, spec)
    found = fused_moe(x, weights, ids, None, w13, w2, spec)
    assert relative_error(found, expected) < 1e-5
    assert not found[4].any()


def test_expert_map():
    w13, w2, spec = make_moe()
    x = torch.randn(9, 128)
    weights, ids = random_routing(9, 2, 6)
    expert_map = torch.tensor([-1, 2, -1, 0, 1, -1], dtype=torch.int32)
    expected = exact_moe(x, weights, ids, {1: 2, 3: 0, 4: 1}, w13, w2, spec)
    assert relative_error(fused_moe(x, weights, ids, expert_map, w13, w2, spec), expected) < 1e-5


def test_opcheck():
    weights, spec = random_linear([128, 64], [16, 8], 128, 64, 3)
    prepared = ops.prepare_linear(weights, spec, "torch")
    torch.library.opcheck(torch.ops.milo.linear.default, (torch.randn(4, 128), prepared, *spec, "torch"))
    w13, w2, moe = make_moe()
    router, ids = random_routing(5, 2, 3)
    arguments = (torch.randn(5, 128), router, ids, None, w13.present, w2.present, *moe, "torch")
    torch.library.opcheck(torch.ops.milo.fused_moe.default, arguments)


def test_operators_compile_into_one_graph():
    weights, spec = random_linear([128, 64], [16, 8], 128, 64, 3)
    prepared = ops.prepare_linear(weights, spec, "torch")
    compiled = torch.compile(lambda x: ops.linear(x * 2, prepared, spec, "torch") + 1, fullgraph=True, backend="eager")
    x = torch.randn(4, 128)
    torch.testing.assert_close(compiled(x), linear(x * 2, weights, spec) + 1)


@pytest.mark.parametrize(
    ("value", "operator", "device", "expected"),
    [
        ("auto", "fused_moe", "cuda", "triton"),
        ("auto", "fused_moe", "cpu", "torch"),
        ("torch", "fused_moe", "cuda", "torch"),
    ],
)
def test_backend_choice(value, operator, device, expected, monkeypatch, caplog):
    ops.choose_backend.cache_clear()
    monkeypatch.setenv(ops.BACKEND_VARIABLE, value)
    with caplog.at_level("INFO", logger="vllm.milo"):
        assert [ops.choose_backend(operator, device) for _ in range(2)] == [expected] * 2
    assert [record.message for record in caplog.records] == [
        f"milo::{operator} on {device} runs on the {expected} backend"
    ]
    ops.choose_backend.cache_clear()


def test_unknown_backend(monkeypatch):
    ops.choose_backend.cache_clear()
    monkeypatch.setenv(ops.BACKEND_VARIABLE, "cuda")
    with pytest.raises(ValueError, match="VLLM_MILO_BACKEND='cuda': must be one of auto, torch, triton"):
        ops.choose_backend("linear", "cpu")
    ops.choose_backend.cache_clear()
