"""Notes what layers launch, with Triton as on a GPU, but without one.

    python note_launches.py

The layers have shapes but no memory. Prints a JSON object: "left", by layer, how many of the kernels that any number of
tokens takes are not among those that are compiled ahead ("ahead"); "compiled", how many kernels Triton made of some
noted launches ("noted"), and how many more when they were launched; "ranks", of layers that differ in their ranks, how
many there are, how many keys of the warm-up they have, for how many of the keys the launched kernels differ, how many
kernels the layers launch that differ from each other, how many are compiled, and how many would be layer by layer.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch
import triton
from meta_layers import make_experts, meta_layer, run_dense, run_experts, run_routed_experts, run_wide

from vllm_milo.kernels import warm_up
from vllm_milo.kernels.compiling import threads
from vllm_milo.kernels.compiling.jobs import TargetDriver
from vllm_milo.kernels.compiling.threads import Compiler, Share
from vllm_milo.kernels.launch import Launch, LaunchMode, noting
from vllm_milo.kernels.serving import activation, fused_moe, prepare, reduce
from vllm_milo.kernels.serving.dense import expand, linear, wide
from vllm_milo.kernels.serving.gemm import heuristic
from vllm_milo.kernels.serving.gemm import kernel as gemm
from vllm_milo.kernels.serving.projection import kernel as projection
from vllm_milo.kernels.warm_up import linear_key, moe_key, token_counts
from vllm_milo.kernels.weights import LinearSpec

LAYERS: dict[str, Callable[[int], None]] = {
    "Mixtral": partial(run_experts, experts=8, top_k=2, hidden=4096, intermediate=14336),
    "DeepSeek": partial(run_experts, experts=64, top_k=6, hidden=2048, intermediate=1408),
    "small experts": partial(run_experts, experts=6, top_k=2, hidden=256, intermediate=128),
    "two group sizes": partial(run_experts, experts=8, top_k=2, hidden=576, intermediate=1536, groups=(64, 128)),
    "qkv": partial(run_dense, widths=[4096, 1024, 1024], k=4096, rank=512),
    "o": partial(run_dense, widths=[4096], k=4096, rank=512),
    "small dense": partial(run_dense, widths=[192], k=192, rank=0),
}
WIDE = {"qkv": (6144, 4096), "short K": (5120, 2048), "few programs": (2048, 4096), "large": (14336, 4096)}
"""Outputs and inputs of layers that are kept in 16 bits."""
MOST = 3000
KERNELS = [
    value
    for module in (activation, gemm, prepare, projection, reduce)
    for name, value in vars(module).items()
    if name.endswith("_kernel")
]


def note(run: Callable[[int], None], counts: Iterable[int]) -> dict[Any, Launch]:
    """Return the launches of a layer."""
    with noting() as launches:
        for count in counts:
            run(count)
    return launches


def made() -> int:
    """Return how many kernels this process has compiled."""
    return sum(len(caches[0]) for kernel in KERNELS for caches in kernel.device_caches.values())


def left_of_routed() -> int:
    """Return how many kernels of experts that are chosen by logits of any kind are not compiled ahead."""
    spec, w13, w2 = make_experts(128, 2048, 768)

    def note_all(what: str, key: object, call: Callable[[int], None], *rest: Any) -> None:
        for count in token_counts(rest[-1]):
            call(count)

    patches = mock.patch.object(warm_up, "_warm_up", note_all), mock.patch.object(warm_up.ops, "routed_moe", _routed)
    with patches[0], patches[1], noting() as ahead:
        warm_up.warm_up_moe(w13, w2, None, spec, "triton", 2048, 128, 8, torch.bfloat16, MOST, True)
    left: set[Any] = set()
    for kind, padded in product((torch.bfloat16, torch.float32), (False, True)):
        run = partial(run_routed_experts, kind=kind, padded=padded)
        left |= note(run, [*range(1, 40), *range(41, MOST, 37), MOST]).keys() - ahead.keys()
    return len(left)


def _routed(*arguments: Any) -> torch.Tensor:
    return fused_moe.routed_moe(*arguments[:-1])  # but for the backend


def ragged_experts() -> Iterator[tuple[Any, Callable[[int], None]]]:
    """Yield the warm-up's key and what runs the layer, of MoE layers that differ in their ranks."""
    sizes = {"experts": 8, "hidden": 4096, "intermediate": 1792}
    for ranks in ((0, 0), (16, 16), (32, 16), (64, 48), (80, 64), (112, 64), (128, 80), (144, 96), (176, 128)):
        spec, w13, w2 = make_experts(**sizes, ranks=ranks)
        yield moe_key(w13, w2, None, spec, 2, torch.bfloat16), partial(run_experts, top_k=2, **sizes, ranks=ranks)


def ragged_dense() -> Iterator[tuple[Any, Callable[[int], None]]]:
    """Yield likewise of dense layers."""
    widths, k = [1024, 256, 256], 4096
    weights = meta_layer(3, 1, sum(widths), k, 64, 3)
    for rank in (0, 16, 24, 32, 48, 64, 80, 128, 144):
        spec = LinearSpec(widths, [rank] * 3, 64, 3)
        yield linear_key(weights, spec, k, torch.bfloat16), partial(run_dense, widths=widths, k=k, rank=rank)


def compare_ranks(layers: Iterable[tuple[Any, Callable[[int], None]]]) -> list[int]:
    """Return what "ranks" says of some layers, which are compiled in the order of a load."""
    launched: dict[Any, list[frozenset[Any]]] = defaultdict(list)
    done: list[Launch] = []
    with mock.patch.object(threads, "_compile", lambda launch, *_: done.append(launch) or 0.0):
        compiler = Compiler(Share())
        for key, run in layers:
            noted = note(run, [*range(1, 40), 64, 65, 130, 300, 1000, MOST])
            launched[key].append(frozenset(noted))
            for future in compiler.start(noted, torch.device("meta")):
                future.result()
    different = sum(len(set(kernels)) > 1 for kernels in launched.values())
    every = [kernels for alike in launched.values() for kernels in alike]
    return [len(every), len(launched), different, len(frozenset.union(*every)), len(done), sum(map(len, every))]


def main() -> None:
    """Print the object."""
    triton.runtime.driver.set_active(TargetDriver(90))

    def mode(device: object, few_tokens: bool) -> LaunchMode:
        return LaunchMode(True, few_tokens)

    def only_compile(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *values, **options: kernel.warmup(*values, grid=grid, **options)

    patches = [mock.patch.object(module, "launch_mode", mode) for module in (expand, fused_moe, linear, wide)]
    patches += [mock.patch.object(module, "processors", return_value=132) for module in (heuristic, wide)]
    for patch in patches:
        patch.start()
    left, ahead = {}, {}
    for name, run in LAYERS.items():
        early = note(run, token_counts(MOST)).keys()
        ahead[name] = len(early)
        left[name] = len(note(run, range(1, MOST, 7)).keys() - early)
    for name, (n, k) in WIDE.items():
        for in_codes in (False, True):
            with noting() as launches:
                warm_up.run_wide(n, k, torch.bfloat16, False, in_codes, torch.device("meta"))
            run = partial(run_wide, n=n, k=k, in_codes=in_codes)
            left[f"{name}, in codes: {in_codes}"] = len(note(run, range(1, 40)).keys() - launches.keys())
    left["routed experts"] = left_of_routed()
    noted = note(LAYERS["small experts"], [1, 5])
    for one in noted.values():
        one.kernel.warmup(*one.arguments, grid=(1,), **one.constants)
    first = made()
    with mock.patch.object(type(gemm.gemm_kernel), "__getitem__", only_compile):
        for count in (1, 5):
            LAYERS["small experts"](count)
    ranks = {"experts": compare_ranks(ragged_experts()), "dense": compare_ranks(ragged_dense())}
    compiled = [first, made() - first]
    json.dump({"left": left, "ahead": ahead, "noted": len(noted), "compiled": compiled, "ranks": ranks}, sys.stdout)


if __name__ == "__main__":
    main()
