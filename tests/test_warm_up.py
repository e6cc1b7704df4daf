"""Compiling a layer's kernels when it is loaded."""

from __future__ import annotations

import inspect
import itertools
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from meta_layers import run_dense, run_experts
from random_layers import moe_spec, random_experts, random_linear, random_routing

from vllm_milo.kernels import ops, warm_up
from vllm_milo.kernels.triton import activation, dispatch, fused_moe, gemm, linear, prepare, project, reduce
from vllm_milo.kernels.triton.launch import LaunchMode
from vllm_milo.kernels.warm_up import _Room, token_waves, warm_up_linear, warm_up_moe
from vllm_milo.kernels.weights import LinearWeights


@pytest.mark.parametrize("most", [1, 5, 512, 6000, 10**6])
def test_waves_cover_the_counts_up_to_the_most(most: int):
    waves = token_waves(most)
    counts = sorted({count for wave in waves for count in wave})
    limit = min(most, warm_up.MAX_TOKENS)
    assert waves[0] == [1]
    assert counts[0] == 1
    assert counts[-1] == limit
    assert all(later <= 1.5 * earlier + 0.5 or earlier < 3 for earlier, later in itertools.pairwise(counts))


def test_threads_take_no_more_room_than_there_is():
    room, lock, held, most = _Room(100), threading.Lock(), [0], [0]

    def run(tokens: int):
        with room.take(tokens):
            with lock:
                held[0] += tokens
                most[0] = max(most[0], held[0])
            time.sleep(0.002)
            with lock:
                held[0] -= tokens

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, [100, 60, 40, 50, 50, 1, 99, 30, 30, 30] * 3))
    assert 60 < most[0] <= 100
    assert held[0] == 0


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing_is_done_without_a_gpu(backend: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(warm_up, "_done", set())
    weights, spec = random_linear([64], [16], 64, 64, 3)
    warm_up_linear(list(weights), spec, backend, 64, torch.float16, 64)
    assert not warm_up._done


def compiled() -> int:
    """Return how many kernels this process has compiled or read from disk."""
    kernels = (gemm._gemm_kernel, project._project_kernel, prepare._prepare_kernel)
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


class Recorder:
    """Stands for the kernels: notes what each launch would be compiled for, and runs nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.variants: set = set()
        modules = (gemm, project, prepare, activation, reduce)
        for module in modules:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                monkeypatch.setattr(module, name, self._stand_in(name, KERNELS[name]))
        for module in (fused_moe, linear):
            monkeypatch.setattr(module, "launch_mode", lambda device, few_tokens: LaunchMode(True, few_tokens))
        monkeypatch.setattr(dispatch, "processors", lambda device: 132)

    def _stand_in(self, name: str, parameters: list):
        class Kernel:
            def __getitem__(_, grid: tuple):
                return lambda *values, **constants: self.variants.add(
                    (name, *(self._kind(*pair) for pair in zip(parameters, values, strict=False)), *constants.items())
                )

        return Kernel()

    @staticmethod
    def _kind(parameter, value):
        """What Triton compiles an argument for."""
        if value is None or isinstance(value, torch.Tensor):
            return value if value is None else value.dtype
        return None if parameter.do_not_specialize else (value == 1, value % 16 == 0)


def signatures() -> dict[str, list]:
    """Return the parameters of every kernel as Triton sees them; the interpreter's functions only have names."""
    found = {}
    for module in (gemm, project, prepare, activation, reduce):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            source = inspect.getsource(getattr(module, name).fn)
            free = re.search(r"do_not_specialize=\[([^]]*)\]", source.split("def ")[0])
            counts = re.findall(r'"(\w+)"', free.group(1)) if free else []
            names = inspect.signature(getattr(module, name).fn).parameters
            found[name] = [SimpleNamespace(name=one, do_not_specialize=one in counts) for one in names]
    return found


KERNELS = signatures()


@pytest.mark.parametrize(
    "run",
    [
        partial(run_experts, experts=8, top_k=2, hidden=4096, intermediate=14336),
        partial(run_experts, experts=64, top_k=6, hidden=2048, intermediate=1408),
        partial(run_experts, experts=6, top_k=2, hidden=256, intermediate=128),
        partial(run_dense, widths=[4096, 1024, 1024], k=4096, rank=512),
        partial(run_dense, widths=[4096], k=4096, rank=512),
        partial(run_dense, widths=[192], k=192, rank=0),
    ],
    ids=["Mixtral", "DeepSeek", "small experts", "qkv", "o", "small dense"],
)
def test_waves_find_every_kernel(run, monkeypatch: pytest.MonkeyPatch):
    """What any number of tokens is compiled for, one of the waves' counts is compiled for."""
    recorder = Recorder(monkeypatch)
    most = 3000
    for count in {count for wave in token_waves(most) for count in wave}:
        run(count)
    compiled = set(recorder.variants)
    for count in range(1, most, 7):
        run(count)
    assert recorder.variants == compiled
    assert 5 < len(compiled) < 90


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
    spec = moe_spec(ranks13, ranks2, 64, 3, "silu", False)
    w13, w2 = (
        ops.prepare_experts(type(w)(*(t.cuda() for t in w)), spec, "triton")
        for w in (random_experts(ranks13, 1024, 512, 64, 3), random_experts(ranks2, 512, 512, 64, 3))
    )
    warm_up_moe(w13, w2, None, spec, "triton", 512, 8, 2, torch.bfloat16, 512)
    before = compiled()
    for tokens in TOKENS:
        router, ids = (t.cuda() for t in random_routing(tokens, 2, 8))
        x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
        ops.fused_moe(x, router, ids, None, w13, w2, spec, "triton")
    assert compiled() == before > 0
