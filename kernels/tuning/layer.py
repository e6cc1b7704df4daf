"""Random experts of a shape, as a tuner runs them: with tiles that are given, over inputs that come from memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import NamedTuple

import torch

from .. import ops, reference
from ..serving.fused_moe import fused_moe
from ..tuned import Tiles
from ..weights import RANK_BLOCK, MoEShape
from .random_weights import moe_spec, random_experts
from .timing import CALLS_IN_GRAPH, BadOutputError, l2_bytes, time_calls

PREFERENCE = 0.5
"""Standard deviation of what all tokens' scores of an expert have in common, where a token's own part has 1."""
MAX_ERROR = 0.02
"""Largest relative error against float32; rounding in bf16 alone gives about 0.004."""


class Inputs(NamedTuple):
    """What the calls of one graph get: activations [T, H], router weights [T, k] and expert ids int32 [T, k] each."""

    x: list[torch.Tensor]
    router: list[torch.Tensor]
    ids: list[torch.Tensor]


class WrongResultError(RuntimeError):
    """Tiles whose result is not that of the reference."""


class Layer:
    """Experts of random weights, and copies of them where one token's would stay in the L2 cache.

    Args:
        shape: of the layer.
        device: a GPU, or the CPU for Triton's interpreter.
        dtype: of the activations.
    """

    def __init__(self, shape: MoEShape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        rank13, rank2 = shape.ranks[0] // 2 // RANK_BLOCK * RANK_BLOCK, shape.ranks[1]
        if shape.ranks[0] and not rank13:
            rank13 = RANK_BLOCK
        self.spec = moe_spec(rank13, rank2)
        self.sources = (
            random_experts(shape.experts, 2, rank13, 2 * shape.intermediate, shape.hidden, shape.groups[0], device),
            random_experts(shape.experts, 1, rank2, shape.hidden, shape.intermediate, shape.groups[1], device),
        )
        prepared = [ops.prepare_experts(source, self.spec, "triton") for source in self.sources]
        self.copies = [prepared, *([[t.clone() for t in w] for w in prepared] for _ in range(self._copies() - 1))]

    def _copies(self) -> int:
        """Return how many layers the calls rotate over: 1 where one token's experts already overflow L2."""
        bytes_ = sum(source.packed.nbytes + source.scale.nbytes + source.zero.nbytes for source in self.sources)
        one_token = bytes_ * self.shape.top_k / self.shape.experts
        return 1 if one_token > l2_bytes(self.device) else CALLS_IN_GRAPH

    def inputs(self, tokens: int) -> Inputs:
        """Return inputs of unit size and routings, the same for the same number of tokens.

        Every second call's tokens prefer some experts, as those of trained routers do: with tokens that prefer none,
        all experts have about the mean, and the best tiles are those for the mean alone.
        """
        torch.manual_seed(tokens)
        inputs = Inputs([], [], [])
        for call in range(CALLS_IN_GRAPH):
            inputs.x.append(torch.randn(tokens, self.shape.hidden, dtype=self.dtype, device=self.device))
            scores = torch.randn(tokens, self.shape.experts, device=self.device)
            if call % 2:
                scores += PREFERENCE * torch.randn(self.shape.experts, device=self.device)
            logits, ids = scores.topk(self.shape.top_k, dim=-1)
            inputs.router.append(logits.softmax(dim=-1))
            inputs.ids.append(ids.to(torch.int32))
        return inputs

    def calls(self, inputs: Inputs, tiles: Tiles) -> list[Callable[[], torch.Tensor]]:
        """Return the calls of one graph with these tiles."""
        return [
            partial(fused_moe, x, router, ids, None, w13, w2, self.spec, tiles)
            for (w13, w2), x, router, ids in zip(cycle(self.copies), *inputs, strict=False)
        ]

    def expected(self, inputs: Inputs) -> torch.Tensor:
        """Return the first call's result by the reference in float32, from the weights in the checkpoint layout."""
        x, router, ids = (values[0] for values in inputs)
        return reference.fused_moe(x.float(), router, ids, None, *self.sources, self.spec)


class Point:
    """A layer at one number of tokens: what takes the time of a pair of tiles.

    Args:
        layer: of random weights.
        tokens: of a call.
        seconds: about how long to measure one pair of tiles.
    """

    def __init__(self, layer: Layer, tokens: int, seconds: float) -> None:
        self.layer, self.seconds = layer, seconds
        self.inputs = layer.inputs(tokens)
        self.expected = layer.expected(self.inputs)

    def microseconds(self, tiles: Tiles) -> float:
        """Return the median time of a call, after its result was compared with the reference.

        Raises:
            WrongResultError: the result is another.
            BadOutputError: a call leaves part of its output unwritten.
        """
        calls = self.layer.calls(self.inputs, tiles)
        self._check(calls[0]())
        timing, outputs = time_calls(calls, self.layer.device, self.seconds)
        self._check(outputs[0])
        return timing.median * 1e6

    def _check(self, found: torch.Tensor) -> None:
        if not bool(torch.isfinite(found).all()):
            raise BadOutputError("the result is not finite")
        error = float((found.float() - self.expected).norm() / self.expected.norm())
        if not error < MAX_ERROR:
            raise WrongResultError(f"relative error {error:.3g} against float32, above {MAX_ERROR}")
