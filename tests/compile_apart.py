"""Has what layers launch compiled in other processes, with Triton as on a GPU, but without one.

    python compile_apart.py

Prints a JSON object: "launches", how many were noted; "loaded", of which this process found the machine code in
Triton's cache; "compiled", which it had to compile; "helpers", how many processes compiled for it, and "left", how many
of them still run when all is done.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest import mock

import torch
import triton
from meta_layers import run_dense, run_experts, run_repack, run_wide

from vllm_milo.kernels.compiling import helpers
from vllm_milo.kernels.compiling.helpers import Helper
from vllm_milo.kernels.compiling.jobs import TargetDriver
from vllm_milo.kernels.compiling.threads import Compiler, Share
from vllm_milo.kernels.launch import Launch, LaunchMode, noting
from vllm_milo.kernels.serving import fused_moe
from vllm_milo.kernels.serving.dense import linear, wide
from vllm_milo.kernels.serving.gemm import heuristic


def note_layers() -> dict[Any, Launch]:
    """Return launches of every kind of layer, short and long inputs."""
    with noting() as launches:
        run_experts(1, experts=8, top_k=2, hidden=256, intermediate=128)
        run_experts(300, experts=8, top_k=2, hidden=256, intermediate=128)
        run_dense(1, widths=[192], k=192, rank=16)
        run_wide(1, 512, 512)
        run_repack(64, 3)
    return launches


def main() -> None:
    """Print the object."""
    triton.runtime.driver.set_active(TargetDriver(90))
    found: list[bool] = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: found.append(cache_hit)
    made: list[Helper] = []

    def only_compile(launch: Launch) -> None:  # loading needs the device
        launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.constants)

    class Noted(Helper):
        def __init__(self, capability: int) -> None:
            super().__init__(capability)
            made.append(self)

    patches = [
        mock.patch.object(module, "launch_mode", lambda device, few_tokens: LaunchMode(True, few_tokens))
        for module in (fused_moe, linear, wide)
    ]
    patches += [mock.patch.object(module, "processors", return_value=132) for module in (heuristic, wide)]
    patches += [mock.patch.object(Launch, "compile", only_compile), mock.patch.object(helpers, "Helper", Noted)]
    for patch in patches:
        patch.start()
    launches = note_layers()
    for future in Compiler(Share()).start(launches, torch.device("meta")):
        future.result()
    left = sum(helper._process.poll() is None for helper in made)
    counts = {"loaded": found.count(True), "compiled": found.count(False), "helpers": len(made), "left": left}
    json.dump({"launches": len(launches)} | counts, sys.stdout)


if __name__ == "__main__":
    main()
