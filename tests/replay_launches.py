"""Launches two layers by a recording and without, with Triton as on a GPU but for its driver, which only writes down.

    python replay_launches.py

Prints a JSON object: "recorded", how many recordings there are after a call of the first layer; for "direct" and
"replayed", the launches of the second: the kernel's hash, the grid, and the arguments as the driver's launcher takes
them, addresses of inputs by their place, those of other memory as "own", what is no argument at run time as null.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest import mock

import torch
import triton
from meta_layers import make_experts

from vllm_milo.kernels.compiling.jobs import TargetDriver
from vllm_milo.kernels.launch import LaunchMode
from vllm_milo.kernels.replaying import experts, recording
from vllm_milo.kernels.serving import fused_moe
from vllm_milo.kernels.serving.gemm import heuristic

Launch = tuple[str, tuple[int, ...], list[Any]]
made: list[Launch] = []


class Launcher:
    """What Triton launches a compiled kernel by: it takes what a GPU's would, and launches nothing."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.hash = metadata.hash
        self.signature = list(source.signature.values())

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        _packed, _metadata, _enter, _exit, *arguments = rest
        assert len(arguments) == len(self.signature)
        made.append((self.hash, (x, y, z), list(taken(self.signature, arguments))))


def taken(signature: Any, arguments: Any) -> Any:
    """Yield what a launcher reads of arguments, by their types."""
    for kind, value in zip(signature, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from taken(kind, value)
        elif kind == "constexpr":
            yield None
        elif kind.startswith("*"):
            yield ["address", value if isinstance(value, int) else value.data_ptr()]
        else:
            yield value


class Driver(TargetDriver):
    """A driver that loads and launches nothing."""

    launcher_cls = Launcher

    def __init__(self) -> None:
        super().__init__(90)
        self.utils = mock.Mock()
        self.utils.load_binary.return_value = (1, 2, 32, 0, 1024)
        self.utils.get_device_properties.return_value = {"max_shared_mem": 227 * 1024}


def inputs(tokens: int) -> list[Any]:
    """Return what a layer takes, in memory."""
    spec, w13, w2 = make_experts(8, 256, 128)
    weights = [[torch.empty_like(one, device="cpu") for one in layer] for layer in (w13, w2)]
    x, router = torch.empty(tokens, 256, dtype=torch.bfloat16), torch.empty(tokens, 2)
    return [x, router, torch.empty(tokens, 2, dtype=torch.int32), None, *weights, spec]


def told(launches: list[Launch], given: list[Any]) -> list[Any]:
    """Return launches with places for addresses."""
    known = {0: "none"}
    flat = [one for value in given for one in (value if isinstance(value, list) else [value])]
    known |= {one.data_ptr(): str(place) for place, one in enumerate(flat) if torch.is_tensor(one)}

    def place(value: Any) -> Any:
        return known.get(value[1], "own") if isinstance(value, list) else value

    return [[name, grid, [place(one) for one in arguments]] for name, grid, arguments in launches]


def main() -> None:
    """Print the object."""
    triton.runtime.driver.set_active(Driver())
    mock.patch.object(heuristic, "processors", return_value=132).start()
    modes = {few: LaunchMode(True, few) for few in (False, True)}
    mock.patch.object(fused_moe, "launch_mode", lambda device, few_tokens: modes[few_tokens]).start()
    found: dict[str, Any] = {}
    for tokens in (1, 40):
        experts.fused_moe(*inputs(tokens))
        second = inputs(tokens)
        row: dict[str, Any] = {"recorded": sum(one is not None for one in recording._recordings.values())}
        for name, layer in (("direct", fused_moe), ("replayed", experts)):
            made.clear()
            kept = layer.fused_moe(*second)
            row[name] = told(made, second)
            del kept
        found[str(tokens)] = row
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
