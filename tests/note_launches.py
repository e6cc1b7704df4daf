"""Notes what layers launch, with Triton as on a GPU, but without one.

    python note_launches.py

The layers have shapes but no memory. Prints a JSON object: "left", by layer, how many of the kernels that any number of
tokens takes are not among those that are compiled ahead ("ahead"); "compiled", how many kernels Triton made of some
noted launches ("noted"), and how many more when they were launched.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any
from unittest import mock

import triton
from compile_for_gpu import Driver
from meta_layers import run_dense, run_experts

from vllm_milo.kernels.launch import Launch, LaunchMode, noting
from vllm_milo.kernels.serving import activation, dispatch, fused_moe, linear, prepare, reduce
from vllm_milo.kernels.serving.gemm import kernel as gemm
from vllm_milo.kernels.serving.projection import kernel as projection
from vllm_milo.kernels.warm_up import token_counts

LAYERS: dict[str, Callable[[int], None]] = {
    "Mixtral": partial(run_experts, experts=8, top_k=2, hidden=4096, intermediate=14336),
    "DeepSeek": partial(run_experts, experts=64, top_k=6, hidden=2048, intermediate=1408),
    "small experts": partial(run_experts, experts=6, top_k=2, hidden=256, intermediate=128),
    "qkv": partial(run_dense, widths=[4096, 1024, 1024], k=4096, rank=512),
    "o": partial(run_dense, widths=[4096], k=4096, rank=512),
    "small dense": partial(run_dense, widths=[192], k=192, rank=0),
}
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


def main() -> None:
    """Print the object."""
    triton.runtime.driver.set_active(Driver(90))

    def mode(device: object, few_tokens: bool) -> LaunchMode:
        return LaunchMode(True, few_tokens)

    def only_compile(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *values, **options: kernel.warmup(*values, grid=grid, **options)

    patches = [mock.patch.object(module, "launch_mode", mode) for module in (fused_moe, linear)]
    patches.append(mock.patch.object(dispatch, "processors", return_value=132))
    for patch in patches:
        patch.start()
    left, ahead = {}, {}
    for name, run in LAYERS.items():
        early = note(run, token_counts(MOST)).keys()
        ahead[name] = len(early)
        left[name] = len(note(run, range(1, MOST, 7)).keys() - early)
    noted = note(LAYERS["small experts"], [1, 5])
    for one in noted.values():
        one.kernel.warmup(*one.arguments, grid=(1,), **one.constants)
    first = made()
    with mock.patch.object(type(gemm.gemm_kernel), "__getitem__", only_compile):
        for count in (1, 5):
            LAYERS["small experts"](count)
    json.dump({"left": left, "ahead": ahead, "noted": len(noted), "compiled": [first, made() - first]}, sys.stdout)


if __name__ == "__main__":
    main()
