"""Times dense layers with large compensators (attention, shared experts): ours against bf16, Marlin and Humming.

    python -m benchmarks.kernels.linear -o out/linear.json
    python -m benchmarks.kernels.linear -o out/linear.json --shapes mixtral-qkv --rank 1024

Ours carries compensators of ``--rank`` in 3 bits on every part; ``milo-8bit`` is the same layer as servers with room
keep it, compensators added, in 16 bits and for few tokens in 8, ``milo-16bit`` the same without the 8 bits; the peers
carry none. The calls of a graph rotate over so many copies of the layer that their 3-bit weights are three times L2,
for all contenders alike. Roofs, errors and files are as in ``moe_layer.py``.
"""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import torch

from benchmarks.kernels import run
from benchmarks.kernels.moe_contenders import GROUP, int4_scales
from benchmarks.kernels.run import DTYPE, Point, Subject
from vllm_milo.kernels import ops, reference
from vllm_milo.kernels.tuning.random_weights import random_linear, random_words
from vllm_milo.kernels.tuning.timing import CALLS_IN_GRAPH, l2_bytes


class LinearShape(NamedTuple):
    """A dense layer: the widths of its fused parts, and its inputs."""

    widths: list[int]
    k: int

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(self.widths) * self.k


SHAPES = {
    "mixtral-qkv": LinearShape([4096, 1024, 1024], 4096),
    "mixtral-o": LinearShape([4096], 4096),
    "deepseek-qkv": LinearShape([2048, 2048, 2048], 2048),
    "deepseek-o": LinearShape([2048], 2048),
    "deepseek-shared-gate-up": LinearShape([2816, 2816], 2048),
    "deepseek-shared-down": LinearShape([2048], 2816),
    "qwen3-qkv": LinearShape([4096, 512, 512], 2048),
    "qwen3-o": LinearShape([2048], 4096),
    "tiny": LinearShape([128, 64], 128),
}


class Dense(NamedTuple):
    """One contender's layer.

    Attributes:
        weights: everything stored for it on the device.
        call: (weights, x [T, K]) -> [T, N].
        ranks: of the parts' compensators.
        reference: the same layer in float32; None where there is no such check.
    """

    weights: list[torch.Tensor]
    call: Callable[[Sequence[torch.Tensor], torch.Tensor], torch.Tensor]
    ranks: list[int]
    reference: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def bytes(self) -> int:
        """Stored bytes."""
        return sum(tensor.nbytes for tensor in self.weights)


def milo(shape: LinearShape, tokens: Sequence[int], device: torch.device, rank: int, kept_in: int = 3) -> Dense:
    """Ours: 3 bits, groups of 64, compensators of ``rank`` in 3 bits; ``kept_in`` 16 or 8 bits all is added."""
    backend = ops.choose_backend("linear", device.type)
    weights, spec = random_linear(shape.widths, rank, shape.k, GROUP, device)

    def exact(x: torch.Tensor) -> torch.Tensor:
        return reference.linear(x.float(), weights, spec)

    if kept_in > 3:
        wide = ops.expand_linear(weights, spec, DTYPE, backend)
        return Dense([wide, *(ops.encode_linear(wide)[0] if kept_in == 8 else [])], kept, [], exact)
    prepared = ops.prepare_linear(weights, spec, backend)
    return Dense(prepared, lambda tensors, x: ops.linear(x, list(tensors), spec, backend), spec.ranks, exact)


def kept(tensors: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Ours, on weights in 16 bits, and in 8 where there are."""
    return ops.wide_linear(x, list(tensors), None, ops.choose_backend("linear", x.device.type))


def plain(tensors: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """PyTorch's matmul on weights in 16 bits."""
    return torch.nn.functional.linear(x, tensors[0])


def bf16(shape: LinearShape, tokens: Sequence[int], device: torch.device) -> Dense:
    """PyTorch's matmul on bf16 weights."""
    weight = torch.randn(sum(shape.widths), shape.k, dtype=DTYPE, device=device) * shape.k**-0.5
    return Dense([weight], plain, [])


def marlin(shape: LinearShape, tokens: Sequence[int], device: torch.device, group: int) -> Dense:
    """vLLM's Marlin on symmetric int4 (``uint4b8``), called as its linear layers call it."""
    from vllm.model_executor.layers.quantization.utils.marlin_utils import (
        apply_gptq_marlin_linear,
        marlin_make_workspace_new,
    )
    from vllm.scalar_type import scalar_types

    n, k = sum(shape.widths), shape.k
    empty = torch.empty(0, dtype=torch.int32, device=device)
    fixed: dict[str, Any] = {
        "weight_zp": empty,
        "workspace": marlin_make_workspace_new(device),
        "wtype": scalar_types.uint4b8,
        "output_size_per_partition": n,
        "input_size_per_partition": k,
    }
    # later versions of vLLM have no activation order
    act_order = {"g_idx": empty, "g_idx_sort_indices": empty, "is_k_full": True}
    known = inspect.signature(apply_gptq_marlin_linear).parameters
    fixed |= {key: value for key, value in act_order.items() if key in known}

    def call(tensors: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return apply_gptq_marlin_linear(input=x, weight=tensors[0], weight_scale=tensors[1], **fixed)

    words = random_words((k // 16, n * 2), device)  # tiles of 16 x 16 codes, 8 in a word
    return Dense([words, int4_scales((k // group, n), k, device)], call, [])


def humming(shape: LinearShape, tokens: Sequence[int], device: torch.device) -> Dense:
    """Humming's dense GEMM on uint3 with integer zero points, groups of 64."""
    from benchmarks.kernels.humming_gemm import Codes, HummingGemm

    gemm = HummingGemm(sum(shape.widths), shape.k, None, tokens, Codes(3, 64, "integers"), device)
    return Dense(gemm.weights, lambda tensors, x: gemm(tensors, x, x.shape[0]), [])


def contenders(rank: int) -> dict[str, Callable[[LinearShape, Sequence[int], torch.device], Dense]]:
    """Return every contender by its name in tables."""
    return {
        "milo": partial(milo, rank=rank),
        "milo-8bit": partial(milo, rank=rank, kept_in=8),
        "milo-16bit": partial(milo, rank=rank, kept_in=16),
        "milo-no-compensators": partial(milo, rank=0),
        "bf16": bf16,
        "marlin-int4-g128": partial(marlin, group=128),
        "humming-uint3-g64": humming,
    }


def copies_needed(shape: LinearShape, l2: int) -> int:
    """Return how many copies make three times L2 in 3-bit weights; 1 where nothing is cached (CPU)."""
    return max(1, math.ceil(3 * l2 / (shape.weights * 3.5 / 8)))


def make_point(
    shape: LinearShape, layer: Dense, copies: Sequence[Sequence[torch.Tensor]], device: torch.device, tokens: int
) -> Point:
    """Return the calls, bytes and operations of one layer at one token count."""
    count = max(CALLS_IN_GRAPH, len(copies))
    x = [torch.randn(tokens, shape.k, dtype=DTYPE, device=device) for _ in range(count)]
    n = sum(shape.widths)
    compensators = sum(rank * (width + shape.k) for rank, width in zip(layer.ranks, shape.widths, strict=False))
    return Point(
        [partial(layer.call, weights, row) for weights, row in zip(cycle(copies), x, strict=False)],
        layer.bytes + tokens * (shape.k + n) * DTYPE.itemsize,
        2.0 * tokens * (shape.weights + compensators),
        partial(layer.reference, x[0]) if layer.reference is not None else None,
        {},
    )


def build(name: str, contender: str, arguments: argparse.Namespace) -> Subject:
    """Make one contender's random layer of one shape, and the copies that the calls rotate over."""
    shape, device = SHAPES[name], arguments.device
    layer = contenders(arguments.rank)[contender](shape, arguments.tokens, device)
    count = copies_needed(shape, l2_bytes(device))
    copies = [layer.weights, *([w.clone() for w in layer.weights] for _ in range(count - 1))]
    about = {"bits_per_weight": 8 * layer.bytes / shape.weights, "ranks": layer.ranks, "copies": count}
    return Subject(about, partial(make_point, shape, layer, copies, device))


def main(words: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = run.parser(__doc__, SHAPES, list(contenders(0)))
    parser.add_argument("--rank", type=int, default=512, help="of our compensators, in 3 bits")
    parser.set_defaults(shapes=[name for name in SHAPES if name != "tiny"], contenders=list(contenders(0)))
    run.main("linear", parser.parse_args(words), build)


if __name__ == "__main__":
    main()
