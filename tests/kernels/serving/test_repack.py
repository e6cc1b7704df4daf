"""Layers brought into the kernel layout by few launches, against the same in torch."""

from __future__ import annotations

import pytest
import torch
from random_layers import random_experts, random_linear

from vllm_milo.kernels.serving import layout
from vllm_milo.kernels.serving.layout import KernelWeights
from vllm_milo.kernels.serving.repack import base, factors, layer, norms
from vllm_milo.kernels.serving.repack.tables import rank_table
from vllm_milo.kernels.weights import ExpertWeights

RAGGED = [[16, 3], [0, 24], [0, 0]]
WHOLE_DTYPES = (torch.float16, torch.bfloat16)


def assert_same(found: KernelWeights, expected: KernelWeights) -> None:
    """Assert that layers are equal to the bit, and their norms up to the order of the sums."""
    for name, one, other in zip(KernelWeights._fields, found, expected, strict=True):
        if one is None or other is None:
            assert one is other, name
            continue
        assert (one.shape, one.dtype) == (other.shape, other.dtype), name
        assert one.is_contiguous(), name
        if name == "norms":
            assert torch.allclose(one, other, rtol=1e-5, atol=0), name
        else:
            whole = [t.view(torch.int16) if t.dtype in WHOLE_DTYPES else t for t in (one, other)]
            assert torch.equal(*whole), name


def moved(weights, device: str):
    return type(weights)(*(tensor if tensor is None else tensor.to(device) for tensor in weights))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    ("ranks", "n", "k", "group", "bits"),
    [
        (RAGGED, 2 * 64, 192, 64, 3),
        (RAGGED, 2 * 64, 128, 128, 8),
        (RAGGED, 2 * 64, 64, 32, 16),
        ([[24], [0]], 128, 64, 32, 3),
        ([[0, 0]], 2 * 64, 128, 64, 3),  # no ranks at all
        ([[16, 5], [0, 20]], 2 * 96, 128, 32, 16),  # outputs of a part that fill no block
        ([[0, 0]], 2 * 80, 96, 32, 3),
        ([[8], [0]], 72, 96, 32, 16),  # inputs that fill no half of a unit
    ],
)
def test_experts(ranks: list[list[int]], n: int, k: int, group: int, bits: int, kernel_device: str):
    weights = moved(random_experts(ranks, n, k, group, bits), kernel_device)
    assert_same(layer.prepare_experts(weights, bits), layout.prepare_experts(weights, bits))
    weights = weights._replace(bias=torch.randn(len(ranks), n, device=kernel_device))
    assert_same(layer.prepare_experts(weights, bits), layout.prepare_experts(weights, bits))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    ("widths", "ranks", "k", "group", "bits"),
    [
        ([128, 64, 64], [24, 0, 16], 192, 64, 3),
        ([128, 64], [5, 16], 128, 128, 8),
        ([64], [0], 64, 32, 3),
        ([96, 40, 64], [24, 0, 9], 96, 32, 16),
        ([96, 64], [0, 32], 128, 64, 3),
    ],
)
def test_dense(widths: list[int], ranks: list[int], k: int, group: int, bits: int, kernel_device: str):
    weights, spec = random_linear(widths, ranks, k, group, bits)
    weights = moved(weights, kernel_device)
    assert_same(layer.prepare_linear(weights, spec), layout.prepare_linear(weights, spec))


@pytest.mark.parametrize("experts", [1, 16])
def test_launches_do_not_grow_with_experts(experts: int, monkeypatch: pytest.MonkeyPatch):
    """One for codes, scales and zero points, one for U, one for V and one for the norms."""
    done: list[str] = []
    for module in (base, factors, norms):
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: done.append(kernel.__name__))
    for parts in (2, 1):
        ranks = [[16 * (expert % 3) + 8] * parts for expert in range(experts)]
        layer.prepare_experts(random_experts(ranks, 64 * parts, 64, 64, 3), 3)
    common = ["repack_base_kernel", "repack_up_kernel", "repack_down_kernel"]
    assert done == ["row_norms_kernel", *common, *common]


def test_integer_factors_of_odd_sizes_are_refused():
    weights = random_experts([[16, 16]], 2 * 96, 128, 64, 16)
    with pytest.raises(ValueError, match="found 96 and 128"):
        layer.prepare_experts(weights, 8)


def test_norms_see_every_row_and_column(kernel_device: str):
    """A large scale in the last group of the last row is seen, of its part alone."""
    weights = random_experts([[0, 0], [0, 0]], 2 * 96, 160, 32, 3)
    weights.scale[1, 95, -1] = 1000
    weights.zero[1, 95, -1] = -8
    found = norms.largest_row_norms(moved(weights, kernel_device), 3).cpu()
    assert found[2] > 40000
    assert found[[0, 1, 3]].max() < 100


def test_ranks_lie_one_after_another():
    table = rank_table([24, 0, 8], [128, 64, 192], 8, torch.device("cpu"))
    assert table.tolist() == [
        [0, 16, 128, 0, 0, 0],
        [16, 8, 128, 16 * 128, 16 * 2, 128],
        [24, 8, 192, 24 * 128, 24 * 2, 256],
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [1, 2])
def test_memory_beside_source_and_result_is_small(parts: int):
    weights = random_experts([[32] * parts] * 8, 1024 * parts, 2048, 64, 3)
    weights = moved(weights, "cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = layer.prepare_experts(weights, 3)
    size = sum(tensor.nbytes for tensor in result.present)
    assert torch.cuda.max_memory_allocated() - before < 1.05 * size + 2**20


@pytest.mark.gpu
def test_large_layer():
    """Offsets beyond 2^31 bytes."""
    experts, n, k = 8, 2 * 14336, 4096
    packed = torch.randint(-(2**31), 2**31 - 1, (experts, n, 3 * k // 32), dtype=torch.int32, device="cuda")
    scale, zero = (torch.rand(experts, n, k // 64, device="cuda").half() for _ in range(2))
    nothing = random_experts([[0, 0]], 128, 64, 64, 3)[3:7]
    factors = [tensor.new_empty(0, width).cuda() for tensor, width in zip(nothing, (1344, 224, 384, 64), strict=True)]
    offsets = torch.zeros(2 * experts + 1, dtype=torch.int32, device="cuda")
    weights = ExpertWeights(packed, scale, zero, *factors, offsets)
    found = layer.prepare_experts(weights, 3)
    assert torch.equal(found.packed[-1], layout.repack_matrix(packed[-1]))
    raised = layout.raise_scales(scale[-1:], layout.scale_exponents(scale[-1:]))[0]
    assert torch.equal(found.scale_zero[-1], layout.join_scale_zero(raised, zero[-1], 64))
