"""Compiling a layer's kernels when it is loaded."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from random_layers import moe_spec, random_experts, random_linear, random_routing
from scripts import run_script

from vllm_milo.kernels import ops, warm_up
from vllm_milo.kernels.launch import LaunchMode, launch, noting
from vllm_milo.kernels.serving import prepare
from vllm_milo.kernels.serving.gemm.kernel import gemm_kernel
from vllm_milo.kernels.serving.projection.kernel import project_kernel
from vllm_milo.kernels.warm_up import token_counts, warm_up_linear, warm_up_moe
from vllm_milo.kernels.weights import LinearWeights


@pytest.mark.parametrize("most", [1, 5, 512, 6000, 10**6])
def test_counts_reach_the_most_and_lie_close(most: int):
    counts = token_counts(most)
    assert counts[0] == 1
    assert counts[-1] == min(most, warm_up.MAX_TOKENS)
    assert all(later <= 1.1 * earlier + 1 for earlier, later in itertools.pairwise(counts))


def test_noted_launches_are_not_done():
    done = []

    class Kernel:
        params = ()

        def __getitem__(self, grid: tuple[int, ...]):
            return lambda *arguments, **constants: done.append((grid, arguments, constants))

    kernel, x = Kernel(), torch.zeros(4)
    with noting() as launches:
        for _ in range(2):
            launch(kernel, (3,), LaunchMode(False, True), x, SIZE=4)
    assert [noted.constants for noted in launches.values()] == [{"SIZE": 4, "launch_pdl": True}]
    assert done == []
    launch(kernel, (3,), LaunchMode(False, False), x, SIZE=4)
    assert done == [((3,), (x,), {"SIZE": 4})]


def test_every_kernel_is_compiled_ahead(tmp_path: Path):
    """With Triton as on a GPU: the interpreter compiles nothing."""
    found = json.loads(run_script("note_launches.py", cache=tmp_path))
    assert set(found["left"].values()) == {0}, found
    assert all(5 < number < 60 for number in found["ahead"].values()), found
    for layers, keys, different in found["ranks"].values():
        assert 3 <= keys < layers, "layers share their keys"
        assert different == 0, "layers of one key launch the same kernels"
    assert found["compiled"] == [found["noted"], 0], "launches are told apart as Triton does"


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing_is_done_without_a_gpu(backend: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(warm_up, "_done", set())
    weights, spec = random_linear([64], [16], 64, 64, 3)
    warm_up_linear(list(weights), spec, backend, 64, torch.float16, 64)
    assert not warm_up._done


def compiled() -> int:
    """Return how many kernels this process has compiled or read from disk."""
    kernels = (gemm_kernel, project_kernel, prepare._prepare_kernel)
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


TOKENS = [*range(1, 40), 47, 48, 49, 64, 65, 100, 127, 128, 129, 200, 256, 257, 300, 400, 511, 512]


@pytest.mark.gpu
def test_nothing_is_left_to_compile_for_a_dense_layer():
    weights, spec = random_linear([384, 128, 128], [128, 64, 64], 1024, 64, 3)
    prepared = ops.prepare_linear(LinearWeights(*(t.cuda() for t in weights)), spec, "triton")
    warm_up_linear(prepared, spec, "triton", 1024, torch.bfloat16, 512)
    before = compiled()
    for tokens in TOKENS:
        ops.linear(torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16), prepared, spec, "triton")
    assert compiled() == before > 0


@pytest.mark.gpu
def test_nothing_is_left_to_compile_for_experts():
    ranks13, ranks2 = [[16, 16]] * 8, [[16]] * 8
    spec = moe_spec(ranks13, ranks2, 3, "silu", False)
    w13, w2 = (
        ops.prepare_experts(type(w)(*(t.cuda() for t in w.present)), spec, "triton")
        for w in (random_experts(ranks13, 1024, 512, 64, 3), random_experts(ranks2, 512, 512, 64, 3))
    )
    warm_up_moe(w13, w2, None, spec, "triton", 512, 8, 2, torch.bfloat16, 512)
    before = compiled()
    for tokens in TOKENS:
        router, ids = (t.cuda() for t in random_routing(tokens, 2, 8))
        x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
        ops.fused_moe(x, router, ids, None, w13, w2, spec, "triton")
    assert compiled() == before > 0
