"""Times one whole MoE layer (align, gate/up, SiLU, down, weighted sum): ours against vLLM's other kernels.

    python benchmarks/moe_layer.py -o out/moe.json                 # every shape, token count and contender
    python benchmarks/moe_layer.py -o out/moe.json --shapes mixtral --tokens 16,64 --contenders milo,bf16

Each time is of 8 calls in one CUDA graph, with 8 random routings and inputs, divided by 8. Weights come from device
memory: where one token's experts would fit in L2, the calls rotate over copies of the layer, for all contenders
alike. The roof of a row is what its own stored bytes and its operations take at the copy bandwidth and matmul rate
measured in the same run. A contender that fails is recorded with its error; the others go on.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
from collections.abc import Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from moe_contenders import DEFAULT, DTYPE, Layer, MoEShape, contenders
from moe_report import format_report, plot
from timing import (
    CALLS_IN_GRAPH,
    Budget,
    Ceilings,
    environment,
    error_text,
    l2_bytes,
    measure_ceilings,
    roof,
    time_calls,
    write_json,
)

SHAPES = {
    "mixtral": MoEShape("Mixtral-8x7B", 8, 2, 4096, 14336),
    "deepseek": MoEShape("DeepSeek-MoE-16B", 64, 6, 2048, 1408),
    "qwen3": MoEShape("Qwen3-30B-A3B", 128, 8, 2048, 768),
    "tiny": MoEShape("tiny", 4, 2, 128, 192),
}
BITS_3 = 3.5
MAX_ERROR = 0.02
"""Largest relative error of our bf16 layer against float32; rounding alone gives about 0.004."""


@dataclasses.dataclass
class Inputs:
    """Inputs and routings of the calls of one graph."""

    x: list[torch.Tensor]
    router: list[torch.Tensor]
    ids: list[torch.Tensor]

    def active_experts(self) -> float:
        """Return the mean number of experts that a call reads."""
        return sum(len(ids.unique()) for ids in self.ids) / len(self.ids)


def random_inputs(shape: MoEShape, tokens: int, device: torch.device) -> Inputs:
    """Return inputs of unit size and routings that prefer no expert."""
    inputs = Inputs([], [], [])
    for _ in range(CALLS_IN_GRAPH):
        inputs.x.append(torch.randn(tokens, shape.hidden, dtype=DTYPE, device=device))
        logits, ids = torch.randn(tokens, shape.experts, device=device).topk(shape.top_k, dim=-1)
        inputs.router.append(logits.softmax(dim=-1))
        inputs.ids.append(ids.to(torch.int32))
    return inputs


def copies_needed(shape: MoEShape, l2: int) -> int:
    """Return how many layers the calls rotate over: 1 where one token's 3-bit experts already overflow L2."""
    active = shape.top_k * shape.expert_weights * BITS_3 / 8
    return 1 if active > l2 else CALLS_IN_GRAPH


def measure_point(
    shape: MoEShape, layer: Layer, copies: Sequence[Sequence[torch.Tensor]], tokens: int, ceilings: Ceilings,
    seconds: float, device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Time one layer at one token count and return its row."""
    torch.manual_seed(tokens)  # the same inputs and routings for every contender
    inputs = random_inputs(shape, tokens, device)
    calls = [
        partial(layer.call, weights, *routed)
        for weights, *routed in zip(cycle(copies), inputs.x, inputs.router, inputs.ids, strict=False)
    ]
    timing, outputs = time_calls(calls, device, seconds)
    error = None
    if layer.reference is not None:
        expected = layer.reference(inputs.x[0], inputs.router[0], inputs.ids[0])
        error = float((outputs[0].float() - expected).norm() / expected.norm())
        if not error < MAX_ERROR:
            raise ValueError(f"relative error {error:.3g} against float32, above {MAX_ERROR}")
    active = inputs.active_experts()
    pairs = tokens * shape.top_k
    num_bytes = active * layer.expert_bytes(shape.experts) + 2 * tokens * shape.hidden * DTYPE.itemsize
    compensators = 3 * layer.rank * (shape.hidden + shape.intermediate)
    flops = 2.0 * pairs * (shape.expert_weights + compensators)
    floor = roof(num_bytes, flops, ceilings)
    return {
        "tokens": tokens,
        "microseconds": timing.median * 1e6,
        "minimum_microseconds": timing.minimum * 1e6,
        "replays": timing.replays,
        "active_experts": active,
        "bytes": num_bytes,
        "flops": flops,
        "roof_microseconds": floor.seconds * 1e6,
        "bound": floor.bound,
        "roof_fraction": floor.seconds / timing.median,
        "relative_error": error,
    }


def measure_contender(
    shape: MoEShape,
    name: str,
    arguments: argparse.Namespace,
    ceilings: Ceilings,
    budget: Budget,
    record: dict[str, Any],
) -> None:
    """Build one contender for one shape, time it at every token count, and add its rows to the record."""
    device = arguments.device
    about: dict[str, Any] = {"shape": shape.name, "contender": name}
    if budget.spent():
        record["skipped"].append(about)
        return
    torch.manual_seed(0)
    try:
        layer = contenders(arguments.rank)[name](shape, arguments.tokens, device)
        count = copies_needed(shape, l2_bytes(device))
        copies = [layer.weights, *([w.clone() for w in layer.weights] for _ in range(count - 1))]
    except Exception as error:  # a peer that fails must not stop the others; the record and the table say so
        record["errors"].append(about | {"error": error_text(error)})
        return
    about["bits_per_weight"] = 8 * layer.expert_bytes(shape.experts) / shape.expert_weights
    about["rank"] = layer.rank
    about["copies"] = count
    for tokens in arguments.tokens:
        if budget.spent():
            record["skipped"].append({"shape": shape.name, "contender": name, "tokens": tokens})
            continue
        try:
            row = measure_point(shape, layer, copies, tokens, ceilings, arguments.point_seconds, device)
        except Exception as error:
            record["errors"].append(
                {"shape": shape.name, "contender": name, "tokens": tokens, "error": error_text(error)}
            )
        else:
            record["rows"].append(about | row)
            print(f"{shape.name} {name} {tokens}: {row['microseconds']:.1f} us", flush=True)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure what the arguments ask for; the record is written after every contender."""
    budget = Budget(arguments.seconds)
    device = arguments.device
    ceilings = measure_ceilings(device)
    gc.collect()
    record: dict[str, Any] = {
        "benchmark": "moe_layer",
        "environment": environment(device),
        "ceilings": ceilings._asdict(),
        "settings": {"dtype": str(DTYPE), "rank": arguments.rank, "calls_in_graph": CALLS_IN_GRAPH},
        "rows": [],
        "errors": [],
        "skipped": [],
    }
    for shape in (SHAPES[name] for name in arguments.shapes):
        for name in arguments.contenders:
            measure_contender(shape, name, arguments, ceilings, budget, record)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            write_json(arguments.output, record)
    return record


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON; table and plot are written beside it")
    parser.add_argument("--shapes", default="mixtral,deepseek,qwen3", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--tokens", default="1,4,16,64,256,1024,4096")
    parser.add_argument("--contenders", default=",".join(DEFAULT), help=f"of {', '.join(contenders(0))}")
    parser.add_argument("--rank", type=int, default=16, help="of our experts' compensators, in 3 bits")
    parser.add_argument("--seconds", type=float, default=400, help="start nothing new after this long")
    parser.add_argument("--point-seconds", type=float, default=0.15, help="measuring time of one number")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(words)
    arguments.shapes = arguments.shapes.split(",")
    arguments.contenders = arguments.contenders.split(",")
    arguments.tokens = [int(count) for count in arguments.tokens.split(",")]
    for given, known in ((arguments.shapes, set(SHAPES)), (arguments.contenders, set(contenders(0)))):
        unknown = set(given) - known
        if unknown:
            parser.error(f"unknown {', '.join(sorted(unknown))}: choose from {', '.join(sorted(known))}")
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    """Measure, then write JSON, Markdown and PNG."""
    arguments = parse(words)
    record = run(arguments)
    text = format_report(record)
    arguments.output.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)
    print(plot(record, arguments.output.with_suffix(".png")))


if __name__ == "__main__":
    main()
