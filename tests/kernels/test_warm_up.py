"""Compiling a layer's kernels when it is loaded."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from random_layers import moe_spec, random_experts, random_linear, random_routing
from scripts import run_script

from vllm_milo.kernels import ops, warm_up
from vllm_milo.kernels.compiling import underway
from vllm_milo.kernels.compiling.threads import Compiler, Share
from vllm_milo.kernels.launch import Launch, LaunchMode, launch, noting
from vllm_milo.kernels.serving import choose, prepare
from vllm_milo.kernels.serving.gemm.kernel import gemm_kernel
from vllm_milo.kernels.serving.projection.kernel import project_kernel
from vllm_milo.kernels.stand_in import smallest_experts, stand_in
from vllm_milo.kernels.warm_up import linear_key, moe_key, token_counts, wait, warm_up_linear, warm_up_moe
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
    for layers, keys, different, distinct, compiled, layer_by_layer in found["ranks"].values():
        assert 3 <= keys < layers, "layers share their keys"
        assert different == 0, "layers of one key launch the same kernels"
        assert compiled == distinct < layer_by_layer / 2, "layers of any ranks share what they are compiled for"
    assert found["compiled"] == [found["noted"], 0], "launches are told apart as Triton does"


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing_is_done_without_a_gpu(backend: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(warm_up, "_noted", {})
    weights, spec = random_linear([64], [16], 64, 64, 3)
    assert warm_up_linear(list(weights), spec, backend, 64, torch.float16, 64) == []
    assert not warm_up._noted


@pytest.mark.parametrize(("bits", "intermediate"), [(3, 128), (8, 64), (16, 96)])
def test_what_stands_in_for_experts_has_the_key_of_the_weights(bits: int, intermediate: int):
    hidden, dtype, device = 192, torch.bfloat16, torch.device("cpu")
    ranks13, ranks2 = [[16, 5], [0, 32]], [[8], [0]]
    spec = moe_spec(ranks13, ranks2, bits, "silu", False)
    w13 = random_experts(ranks13, 2 * intermediate, hidden, 64, bits)
    w2 = random_experts(ranks2, hidden, intermediate, 32, bits)
    made = stand_in(2, [intermediate] * 2, hidden, 64, bits, dtype, device, True)
    others = stand_in(2, [hidden], intermediate, 32, bits, dtype, device)
    prepared = [ops.prepare_experts(weights, spec, "triton") for weights in (w13, w2)]
    assert moe_key(made, others, None, spec, 2, dtype) == moe_key(*prepared, None, spec, 2, dtype)
    assert all(tensor.untyped_storage().nbytes() <= 8 for tensor in made)


@pytest.mark.parametrize("ranks", [[0, 0], [24, 0]])
def test_what_stands_in_for_a_dense_layer_has_the_key_of_the_weights(ranks: list[int]):
    weights, spec = random_linear([96, 64], ranks, 160, 32, 16)
    prepared = ops.prepare_linear(weights, spec, "triton")
    made = stand_in(1, [96, 64], 160, 32, 16, torch.bfloat16, torch.device("cpu"))
    expected = linear_key(prepared, spec, 160, torch.bfloat16)
    if sum(ranks):
        assert linear_key(made, spec, 160, torch.bfloat16) == expected
    else:  # empty tensors have no address, which is a multiple of 16 too
        assert [tensor.dtype for tensor in made] == [tensor.dtype for tensor in prepared]


@pytest.mark.parametrize("bits", [3, 8, 16])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_smallest_experts_are_a_layer(parts: int, bits: int):
    weights = smallest_experts(parts, 64, bits, torch.bfloat16, torch.device("cpu"))
    expected = random_experts([[16] * parts], 64 * parts, 128, 64, bits)
    assert weights.bias is None
    for name, one, other in zip(weights._fields[:-1], weights[:-1], expected[:-1], strict=True):
        if bits != 16 or not name.endswith("_scale"):
            assert (one.shape, one.dtype) == (other.shape, other.dtype), name


class Counted(Launch):
    """A launch that notes when it is compiled."""

    def compile(self) -> None:
        self.arguments.append("compiled")
        if self.kernel == "broken":
            raise ValueError("does not compile")


def counted(*names: str) -> dict[str, Counted]:
    return {name: Counted(name, [], {}) for name in names}


def test_each_kernel_is_compiled_once():
    compiler, device = Compiler(Share()), torch.device("cpu")
    first, second = counted("a", "b"), counted("b", "c")
    wait(compiler.start(first, device) + compiler.start(second, device))
    assert [len(launch.arguments) for launch in (*first.values(), *second.values())] == [1, 1, 0, 1]


def test_what_a_compilation_raises_is_raised_for_every_layer_that_needs_it():
    compiler, device = Compiler(Share()), torch.device("cpu")
    for names in (("a", "broken"), ("broken",)):
        with pytest.raises(ValueError, match="does not compile"):
            wait(compiler.start(counted(*names), device))


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Returns what begins to compile launches that the first step waits for."""
    monkeypatch.setattr(underway, "pending", {})
    compiler = Compiler(Share())
    return lambda *names: underway.add(compiler.start(counted(*names), torch.device("cpu")))


def test_the_first_step_waits_for_all_that_was_begun(begun: Callable[..., None], kernel_device: str):
    weights, spec = random_linear([64], [16], 128, 64, 3)
    prepared = [tensor.to(kernel_device) for tensor in ops.prepare_linear(weights, spec, "triton")]
    x = torch.randn(3, 128, device=kernel_device, dtype=torch.float16)
    begun("a", "b")
    with noting():
        underway.settle()
    assert len(underway.pending) == 2, "what notes launches waits for nothing"
    ops.linear(x, prepared, spec, "triton")
    assert not underway.pending
    begun("broken")
    with pytest.raises(ValueError, match="does not compile"):
        ops.linear(x, prepared, spec, "triton")
    assert torch.isfinite(ops.linear(x, prepared, spec, "triton")).all(), "it is compiled at its use"


def test_processes_of_a_host_share_its_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(24)))
    assert [Share(0, size).helpers() for size in (1, 2, 4, 32)] == [8, 8, 5, 1]
    assert Share(0, 2).order("abcde") == list("abcde")
    assert Share(1, 2).order("abcde") == list("cdeab")


def test_router_weights_are_float32_as_in_serving(monkeypatch: pytest.MonkeyPatch):
    """While vLLM makes a model, its dtype is the default."""
    found = []
    monkeypatch.setattr(warm_up, "_warm_up", lambda what, key, call, *_: call(3))
    monkeypatch.setattr(ops, "fused_moe", lambda x, router, *_: found.append((x.dtype, router.dtype)))
    layer = stand_in(2, [64], 64, 64, 3, torch.bfloat16, torch.device("cpu"))
    spec = moe_spec([[16, 16]] * 2, [[16]] * 2, 3, "silu", False)
    torch.set_default_dtype(torch.bfloat16)
    try:
        warm_up_moe(layer, layer, None, spec, "triton", 64, 2, 2, torch.bfloat16, 8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == [(torch.bfloat16, torch.float32)]


def compiled() -> int:
    """Return how many kernels this process has compiled or read from disk."""
    kernels = (gemm_kernel, project_kernel, prepare._prepare_kernel, choose._choose_kernel)
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


TOKENS = [*range(1, 40), 47, 48, 49, 64, 65, 100, 127, 128, 129, 200, 256, 257, 300, 400, 511, 512]


@pytest.mark.gpu
def test_nothing_is_left_to_compile_for_a_dense_layer():
    weights, spec = random_linear([384, 128, 128], [128, 64, 64], 1024, 64, 3)
    prepared = ops.prepare_linear(LinearWeights(*(t.cuda() for t in weights)), spec, "triton")
    # as a load does: by what stands in for the weights, which have the same key
    before_weights = stand_in(1, spec.widths, 1024, 64, 3, torch.bfloat16, prepared[0].device)
    wait(warm_up_linear(before_weights, spec, "triton", 1024, torch.bfloat16, 512))
    before = compiled()
    for tokens in TOKENS:
        ops.linear(torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16), prepared, spec, "triton")
    assert compiled() == before > 0


@pytest.mark.gpu
@pytest.mark.parametrize("renormalizes", [None, True])
def test_nothing_is_left_to_compile_for_experts(renormalizes: bool | None):
    ranks13, ranks2 = [[16, 16]] * 8, [[16]] * 8
    spec = moe_spec(ranks13, ranks2, 3, "silu", False)
    w13, w2 = (
        ops.prepare_experts(type(w)(*(t.cuda() for t in w.present)), spec, "triton")
        for w in (random_experts(ranks13, 1024, 512, 64, 3), random_experts(ranks2, 512, 512, 64, 3))
    )
    common = (torch.bfloat16, w13[0].device)
    before_weights = stand_in(8, [512] * 2, 512, 64, 3, *common, True), stand_in(8, [512], 512, 64, 3, *common)
    wait(warm_up_moe(*before_weights, None, spec, "triton", 512, 8, 2, torch.bfloat16, 512, renormalizes))
    before = compiled()
    for tokens in TOKENS:
        router, ids = (t.cuda() for t in random_routing(tokens, 2, 8))
        x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
        if renormalizes is None:
            ops.fused_moe(x, router, ids, None, w13, w2, spec, "triton")
            continue
        for kind, padding in product((torch.bfloat16, torch.float32), (None, ids[:, 0] > 4)):
            logits = torch.randn(tokens, 8, device="cuda", dtype=kind)
            ops.routed_moe(x, logits, padding, 2, renormalizes, None, w13, w2, spec, "triton")
    assert compiled() == before > 0
