"""Experts that a layer chooses by its router's logits, beside torch's softmax and top-k."""

from __future__ import annotations

import pytest
import torch
from random_layers import moe_spec, random_experts, relative_error

from vllm_milo.kernels import ops, reference
from vllm_milo.kernels.launch import LaunchMode
from vllm_milo.kernels.serving.choose import FEW_TOKENS, Choice, choose
from vllm_milo.kernels.serving.routing import Routes
from vllm_milo.kernels.weights import ExpertWeights, MoESpec

MODE = LaunchMode(asm=False, early=False)
CASES = [(8, 2), (60, 4), (128, 8), (5, 1), (7, 7), (256, 10)]


def chosen(logits: torch.Tensor, top_k: int, renormalizes: bool, padding: torch.Tensor | None = None) -> tuple:
    """Ids and weights by the kernel, in memory that held others."""
    tokens = logits.shape[0]
    ids = torch.full((tokens, top_k), 7777, dtype=torch.int32, device=logits.device)
    weights = torch.full((tokens, top_k), float("nan"), device=logits.device)
    choose(Choice(logits, padding, renormalizes, weights), Routes(ids, None), MODE)
    return ids, weights


@pytest.mark.parametrize("renormalizes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("experts", "top_k"), CASES)
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_the_largest_are_chosen(
    tokens: int, experts: int, top_k: int, dtype: torch.dtype, renormalizes: bool, kernel_device: str
):
    logits = (3 * torch.randn(tokens, experts)).to(dtype).to(kernel_device)
    ids, weights = chosen(logits, top_k, renormalizes)
    order = logits.double().argsort(dim=1, descending=True, stable=True)[:, :top_k]
    assert torch.equal(ids.long(), order)
    shares = logits.double().softmax(1).gather(1, order)
    expected = shares / shares.sum(1, keepdim=True) if renormalizes else shares
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_of_equals_the_first_is_chosen(dtype: torch.dtype, kernel_device: str):
    logits = torch.zeros(3, 9, device=kernel_device, dtype=dtype)
    logits[0, 4] = -0.0
    logits[1, ::2] = 1
    logits[2] = float("-inf")
    logits[2, 5] = -1e4
    ids, weights = chosen(logits, 3, True)
    assert ids.tolist() == [[0, 1, 2], [0, 2, 4], [5, 0, 1]]
    torch.testing.assert_close(weights, torch.tensor([[1 / 3] * 3, [1 / 3] * 3, [1, 0, 0]], device=kernel_device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ids_are_experts_whatever_the_logits(dtype: torch.dtype, kernel_device: str):
    logits = torch.randn(4, 12, device=kernel_device, dtype=dtype)
    logits[0] = float("nan")
    logits[1, 3] = float("nan")
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    logits[2].view(bits).fill_(-1)  # NaN with a sign, which arithmetic need not keep
    logits[3, :9].view(bits).fill_(-1)
    ids, _ = chosen(logits, 4, True)
    for row in ids.tolist():
        assert len({*row} & {*range(12)}) == 4
    assert 3 not in ids[1]
    assert {9, 10, 11} < {*ids[3].tolist()}


def test_rows_of_nobody_go_nowhere(kernel_device: str):
    logits = torch.randn(6, 8, device=kernel_device)
    padding = torch.tensor([0, 1, 0, 0, 1, 1], dtype=torch.uint8, device=kernel_device)
    ids, weights = chosen(logits, 2, True, padding)
    plain, _ = chosen(logits, 2, True)
    assert torch.equal(ids, torch.where(padding[:, None] > 0, -1, plain))
    assert torch.equal(weights.sum(1) > 0, padding == 0)


def random_layer(experts: int, device: str) -> tuple[MoESpec, list[ExpertWeights], list[list[torch.Tensor]]]:
    """The spec of experts of 64 by 64, their weights, and these as Triton takes them on a device."""
    ranks = [[[8, 16]] * experts, [[8]] * experts]
    spec = moe_spec(*ranks, 3)
    sources = [random_experts(ranks[0], 128, 64, 64, 3), random_experts(ranks[1], 64, 64, 64, 3)]
    moved = [type(one)(*(None if t is None else t.to(device) for t in one)) for one in sources]
    return spec, sources, [ops.prepare_experts(one, spec, "triton") for one in moved]


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("padded", ["none", "first", "some", "all"])
@pytest.mark.parametrize("expert_map", [None, [2, -1, 0, 1, -1, 3]])
@pytest.mark.parametrize("tokens", [1, 2, 7, FEW_TOKENS, FEW_TOKENS + 1, 40])
def test_layers_choose_as_the_reference(tokens: int, expert_map: list | None, padded: str, kernel_device: str):
    spec, sources, weights = random_layer(6 if expert_map is None else 4, kernel_device)
    x = torch.randn(tokens, 64).half()
    logits = torch.randn(tokens, 6)
    padding = None if padded == "none" else torch.full((tokens,), padded == "all")
    if padding is not None:
        padding[0 if padded == "first" else tokens // 2 :: 3] = True
    local = None if expert_map is None else torch.tensor(expert_map, dtype=torch.int32)
    expected = ops.routed_moe(x, logits, padding, 2, True, local, *(w.present for w in sources), spec, "torch")
    moved = [None if one is None else one.to(kernel_device) for one in (x, logits, padding, local)]
    found = ops.routed_moe(*moved[:3], 2, True, moved[3], *weights, spec, "triton")
    if padding is not None:
        assert bool((found[padding.to(kernel_device)] == 0).all())
    assert relative_error(found.cpu(), expected.double()) < 2e-3


def test_logits_of_other_experts_or_tokens_are_refused(kernel_device: str):
    spec, _, weights = random_layer(4, kernel_device)
    x = torch.randn(3, 64, device=kernel_device).half()
    for logits, padding in ((torch.randn(3, 5), None), (torch.randn(2, 4), None), (torch.randn(3, 4), torch.zeros(2))):
        rows = None if padding is None else padding.bool().to(kernel_device)
        with pytest.raises(ValueError, match="of 3 tokens and 4 experts"):
            ops.routed_moe(x, logits.to(kernel_device), rows, 2, True, None, *weights, spec, "triton")


def test_the_reference_chooses_as_torch():
    logits = torch.randn(5, 12)
    for renormalizes in (False, True):
        weights, ids = reference.choose(logits, torch.tensor([False, True, False, False, False]), 3, renormalizes)
        shares = logits.softmax(1)
        top = shares.topk(3)
        assert torch.equal(ids[0], top.indices[0])
        assert ids[1].tolist() == [-1] * 3
        expected = top.values / top.values.sum(1, keepdim=True) if renormalizes else top.values
        torch.testing.assert_close(weights[2:], expected[2:])
