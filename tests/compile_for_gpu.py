"""Compiles what layers launch for a GPU that need not be there.

    python compile_for_gpu.py CAPABILITY few|usual|all [portable]

Triton compiles for a target, and only loading needs the device. The layers have shapes but no memory. Prints the
number of kernels. A kernel is an error if it does not compile, asks for more shared memory than a block may have there,
writes registers that an MMA still reads (:mod:`register_hazards`) or breaks the protocol of launches
(:mod:`protocol_in_ptx`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch
import triton
from meta_layers import (
    run_converter,
    run_dense,
    run_experts,
    run_openai_experts,
    run_repack,
    run_routed_experts,
    run_wide,
)
from protocol_in_ptx import pointer_names, violations
from register_hazards import hazards, instructions
from triton.runtime.jit import JITFunction

from vllm_milo.kernels.compiling.jobs import TargetDriver
from vllm_milo.kernels.launch import TOGETHER, LaunchMode
from vllm_milo.kernels.serving import fused_moe
from vllm_milo.kernels.serving.dense import expand, linear, wide
from vllm_milo.kernels.serving.dense.wide import SPREAD_TILES, TILES
from vllm_milo.kernels.serving.gemm import heuristic
from vllm_milo.kernels.serving.gemm.config import GemmConfig

SERVING = "vllm_milo.kernels.serving."
SHORT_TAIL = GemmConfig(16, 128, 2, False, 4, 4, tail_m=8)
"""Multiplies by warpgroups where there are, but the tail by warps."""
JOINED = GemmConfig(64, 128, 1, True, 4, 3, group_blocks=4, tail_m=16, max_registers=168, joined=True)
FAST = GemmConfig(32, 128, 1, True, 4, 3, tail_m=16, max_registers=128)
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}


def layers(capability: int, which: str) -> Iterator[Callable[[], None]]:
    """Yield what runs layers of the usual format, few of them, or those of every format and every tile too."""
    mixtral = partial(run_experts, experts=8, top_k=2, hidden=4096, intermediate=14336)
    if which == "few":  # the shortest and the longest input, which take kernels of their own; one size of groups
        for tokens in (1, 2000):
            yield partial(mixtral, tokens)
            yield partial(run_dense, tokens, [4096, 1024, 1024], 4096, 512)
        yield partial(mixtral, 1, dtype=torch.float16)
        yield partial(mixtral, 16, tile=SHORT_TAIL)
        yield partial(mixtral, 256, ranks=[128, 64], tile=JOINED)
        yield partial(mixtral, 64, ranks=[128, 64], tile=FAST)
        yield partial(run_openai_experts, 1)
        yield partial(run_openai_experts, 1, gated=False)
        for tokens in (1, 3, 16, 17):
            yield partial(run_routed_experts, tokens)
        yield partial(run_wide, 1, 4096, 4096)
        yield partial(run_wide, 16, 4096, 4096)
        yield partial(run_wide, 1, 8, 4096)
        yield partial(run_wide, 16, 128, 2048)
        yield partial(run_wide, 1, 4096, 4096, in_codes=True)
        yield partial(run_wide, 1, 2048, 4096, in_codes=True)
        yield partial(run_wide, 8, 6144, 4096, in_codes=True)
        yield partial(run_wide, 16, 4096, 4096, in_codes=True)
        yield partial(run_wide, 8, 14336, 4096, in_codes=True)
        yield partial(run_wide, 16, 14336, 4096, in_codes=True)
        yield partial(run_converter, 64)
        yield partial(run_repack, 64, 3)
        return
    for tokens in (1, 40, 300, 2000) if capability == 90 else (1, 300):
        yield partial(mixtral, tokens)
        yield partial(run_dense, tokens, [4096, 1024, 1024], 4096, 512)
    yield partial(run_dense, 1500, [4096, 1024, 1024], 4096, 512)  # the most tokens by tiles
    yield partial(run_dense, 1, [4096], 4096, 0)
    for tokens, in_codes in product((*TILES, *SPREAD_TILES), (False, True)):
        yield partial(run_wide, tokens, 4096, 4096, in_codes=in_codes)
        yield partial(run_wide, tokens, 2000, 352, torch.float16, biased=True, in_codes=in_codes)
    for tokens in (1, 2000):
        yield partial(run_openai_experts, tokens)
    yield partial(run_openai_experts, 1, gated=False)
    for tokens, kind, experts in product((1, 3, 16, 5000), (torch.bfloat16, torch.float32), (60, 512)):
        yield partial(run_routed_experts, tokens, kind, kind == torch.float32, experts)
    for group in (32, 64, 128):
        yield partial(run_converter, group)
        yield partial(run_repack, group, 3)
    yield partial(mixtral, 16, tile=SHORT_TAIL)
    for dtype, tile in product((torch.bfloat16, torch.float16), (JOINED, FAST)):
        yield partial(mixtral, 256, ranks=[128, 64], tile=tile, dtype=dtype)
    if which == "usual":
        return
    for group, bits, intermediate in ((32, 8, 320), (128, 3, 384), (64, 16, 320)):
        yield partial(run_repack, group, bits)
        for tokens in (1, 1000):
            yield partial(run_experts, tokens, 8, 2, 512, intermediate, groups=(group, group), bits=bits)
        for tokens in (1, 1000, 2000):
            yield partial(run_dense, tokens, [320], intermediate, 64, group=group, bits=bits)
    for tokens, groups in product((1, 1000), ((64, 128), (128, 64))):
        yield partial(run_experts, tokens, 8, 2, 512, 384, groups=groups)
    yield partial(mixtral, 1000, ranks=[0, 0])
    yield partial(mixtral, 1000, ranks=[1024, 512])
    for tokens in (1, 300):
        yield partial(mixtral, tokens, dtype=torch.float16)
    for tokens in (1, 300, 2000):
        yield partial(run_dense, tokens, [4096, 1024, 1024], 4096, 512, dtype=torch.float16)
    tiles = ((64, 256, 8), (128, 128, 8), (128, 256, 8), (256, 128, 8)) if capability == 90 else ()
    for block_m, block_n, warps in tiles:
        tile = GemmConfig(block_m, block_n, 1, True, warps, 3, group_blocks=4, tail_m=block_m // 4)
        yield partial(mixtral, 1000, tile=tile)


def main(capability: int, which: str, asm: bool) -> None:
    """Compile each kernel once, with or without inline assembly."""
    done: dict[int, Any] = {}

    def compile_only(kernel: JITFunction, grid: tuple[int, ...]) -> Any:
        def launch(*values: Any, **options: Any) -> None:
            made = kernel.warmup(*values, grid=grid, **options)
            if id(made) in done:
                return
            done[id(made)] = made
            # disassembling takes as long as compiling, and only these are looked at
            if "wgmma" in made.asm["ptx"] and (found := hazards(instructions(made.asm["cubin"]))):
                raise ValueError(f"{kernel.__name__} writes registers that an MMA still reads: {found[0]}; {options}")
            names = pointer_names(kernel.arg_names, values)
            early = options.get("launch_pdl", False)
            if kernel.__module__.startswith(SERVING) and (
                found := violations(kernel.__name__, made.asm["ptx"], made.asm["ttir"], names, early)
            ):
                raise ValueError(f"{kernel.__name__} breaks the protocol of launches: it {found[0]}; {options}")
            used, allowed = made.metadata.shared, SHARED_BYTES[capability]
            if used > allowed:
                raise MemoryError(f"{kernel.__name__} wants {used} bytes of shared memory, of {allowed}: {options}")

        return launch

    triton.runtime.driver.set_active(TargetDriver(capability))

    def mode(device: torch.device, few_tokens: bool) -> LaunchMode:
        return LaunchMode(asm, few_tokens and capability >= 90, capability // 10 not in TOGETHER)

    patches = [mock.patch.object(module, "launch_mode", mode) for module in (expand, fused_moe, linear, wide)]
    patches += [mock.patch.object(module, "processors", return_value=132) for module in (heuristic, wide)]
    patches += [
        mock.patch.object(module, "shared_memory", return_value=SHARED_BYTES[capability])
        for module in (heuristic, wide)
    ]
    patches.append(mock.patch.object(JITFunction, "__getitem__", compile_only))
    for patch in patches:
        patch.start()
    for run in layers(capability, which):
        run()
    print(len(done))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], "portable" not in sys.argv)
