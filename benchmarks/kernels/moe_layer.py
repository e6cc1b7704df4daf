"""Times one whole MoE layer (align, gate/up, SiLU, down, weighted sum): ours against vLLM's other kernels.

    python -m benchmarks.kernels.moe_layer -o out/moe.json                 # every shape, token count and contender
    python -m benchmarks.kernels.moe_layer -o out/moe.json --shapes mixtral --tokens 16,64 --contenders milo,bf16

Each time is of 8 calls in one CUDA graph, with 8 random routings and inputs, divided by 8. Weights come from device
memory: where one token's experts would fit in L2, the calls rotate over copies of the layer, for all contenders
alike. The roof of a row is what its own stored bytes and its operations take at the copy bandwidth and matmul rate
measured in the same run. A contender that fails is recorded with its error; the others go on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from itertools import cycle
from typing import NamedTuple

import torch

from benchmarks.kernels import run
from benchmarks.kernels.moe_contenders import DEFAULT, Layer, MoEShape, contenders
from benchmarks.kernels.run import DTYPE, Point, Subject
from vllm_milo.kernels.tuning.timing import CALLS_IN_GRAPH, l2_bytes

SHAPES = {
    "mixtral": MoEShape("Mixtral-8x7B", 8, 2, 4096, 14336),
    "deepseek": MoEShape("DeepSeek-MoE-16B", 64, 6, 2048, 1408),
    "qwen3": MoEShape("Qwen3-30B-A3B", 128, 8, 2048, 768),
    "tiny": MoEShape("tiny", 4, 2, 128, 192),
}
BITS_3 = 3.5


class Inputs(NamedTuple):
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


def make_point(
    shape: MoEShape, layer: Layer, copies: Sequence[Sequence[torch.Tensor]], device: torch.device, tokens: int
) -> Point:
    """Return the calls, bytes and operations of one layer at one token count."""
    inputs = random_inputs(shape, tokens, device)
    calls = [
        partial(layer.call, weights, *routed)
        for weights, *routed in zip(cycle(copies), inputs.x, inputs.router, inputs.ids, strict=False)
    ]
    active = inputs.active_experts()
    compensators = 3 * layer.rank * (shape.hidden + shape.intermediate)
    expected = None
    if layer.reference is not None:
        expected = partial(layer.reference, inputs.x[0], inputs.router[0], inputs.ids[0])
    return Point(
        calls,
        active * layer.expert_bytes(shape.experts) + 2 * tokens * shape.hidden * DTYPE.itemsize,
        2.0 * tokens * shape.top_k * (shape.expert_weights + compensators),
        expected,
        {"active_experts": active},
    )


def build(name: str, contender: str, arguments: argparse.Namespace) -> Subject:
    """Make one contender's random layer of one shape, and the copies that the calls rotate over."""
    shape, device = SHAPES[name], arguments.device
    layer = contenders(arguments.rank)[contender](shape, arguments.tokens, device)
    count = copies_needed(shape, l2_bytes(device))
    copies = [layer.weights, *([w.clone() for w in layer.weights] for _ in range(count - 1))]
    about = {
        "model": shape.name,
        "bits_per_weight": 8 * layer.expert_bytes(shape.experts) / shape.expert_weights,
        "rank": layer.rank,
        "copies": count,
    }
    return Subject(about, partial(make_point, shape, layer, copies, device))


def main(words: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = run.parser(__doc__, SHAPES, list(contenders(0)))
    parser.add_argument("--rank", type=int, default=16, help="of our experts' compensators, in 3 bits")
    parser.set_defaults(shapes=["mixtral", "deepseek", "qwen3"], contenders=list(DEFAULT))
    run.main("moe_layer", parser.parse_args(words), build)


if __name__ == "__main__":
    main()
