"""The MoE layers that ``moe_layer.py`` times: ours, and vLLM 0.26's other ways to run one, with random weights.

A contender is a function from a shape to a :class:`Layer`; peers import vLLM and humming only when they are built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.kernels.run import DTYPE
from vllm_milo.kernels import ops, reference
from vllm_milo.kernels.tuning.random_weights import (
    CODE_SPREAD,
    moe_spec,
    random_experts,
    random_scales,
    random_words,
)

GROUP = 64
"""Group size of ours."""

LayerCall = Callable[[Sequence[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(weights, x [T, H], router weights fp32 [T, k], expert ids int32 [T, k]) -> [T, H]."""


class MoEShape(NamedTuple):
    """The routed experts of one layer."""

    name: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int

    @property
    def expert_weights(self) -> int:
        """Weights of one expert: gate, up and down projection."""
        return 3 * self.hidden * self.intermediate


class Layer(NamedTuple):
    """One layer of a contender.

    Attributes:
        weights: everything stored for it on the device; copies of it can stand in for further layers.
        call: runs the layer.
        rank: of the compensators of each expert's three matrices.
        reference: the same layer in float32 on the unconverted weights; None where there is no such check.
    """

    weights: list[torch.Tensor]
    call: LayerCall
    rank: int = 0
    reference: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    def expert_bytes(self, experts: int) -> float:
        """Return the stored bytes of one expert."""
        return sum(tensor.nbytes for tensor in self.weights) / experts


def milo(shape: MoEShape, tokens: Sequence[int], device: torch.device, rank: int) -> Layer:
    """Ours: 3 bits, groups of 64 with real-valued zero points, 3-bit compensators of ``rank``."""
    backend = ops.choose_backend("fused_moe", device.type)
    spec = moe_spec(rank, rank)
    gate_up = random_experts(shape.experts, 2, rank, 2 * shape.intermediate, shape.hidden, GROUP, device)
    down = random_experts(shape.experts, 1, rank, shape.hidden, shape.intermediate, GROUP, device)
    w13, w2 = (ops.prepare_experts(weights, spec, backend) for weights in (gate_up, down))
    split = len(w13)

    def call(weights: Sequence[torch.Tensor], x: torch.Tensor, router: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return ops.fused_moe(x, router, ids, None, list(weights[:split]), list(weights[split:]), spec, backend)

    def expected(x: torch.Tensor, router: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return reference.fused_moe(x.float(), router, ids, None, gate_up, down, spec)

    return Layer([*w13, *w2], call, rank, expected)


def bf16(shape: MoEShape, tokens: Sequence[int], device: torch.device) -> Layer:
    """vLLM's Triton ``fused_experts`` on bf16 weights."""
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    w1 = torch.randn(shape.experts, 2 * shape.intermediate, shape.hidden, dtype=DTYPE, device=device)
    w2 = torch.randn(shape.experts, shape.hidden, shape.intermediate, dtype=DTYPE, device=device)
    w1 *= shape.hidden**-0.5
    w2 *= shape.intermediate**-0.5
    return Layer([w1, w2], lambda weights, x, router, ids: fused_experts(x, weights[0], weights[1], router, ids))


def wna16(shape: MoEShape, tokens: Sequence[int], device: torch.device, group: int = 64) -> Layer:
    """vLLM's int4 wna16 path (its own choice of CUDA or Triton kernel), groups without zero points."""
    from vllm.model_executor.layers.fused_moe.config import int4_w4a16_moe_quant_config
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    def matrix(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        words = random_words((shape.experts, n, k // 8), device)
        return words.view(torch.uint8), int4_scales((shape.experts, n, k // group), k, device)

    (w1, s1), (w2, s2) = matrix(2 * shape.intermediate, shape.hidden), matrix(shape.hidden, shape.intermediate)

    def call(weights: Sequence[torch.Tensor], x: torch.Tensor, router: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        config = int4_w4a16_moe_quant_config(weights[2], weights[3], block_shape=[0, group])
        return fused_experts(x, weights[0], weights[1], router, ids, quant_config=config)

    return Layer([w1, w2, s1, s2], call)


def int4_scales(shape: tuple[int, ...], k: int, device: torch.device) -> torch.Tensor:
    """Return bf16 scales of random 4-bit codes for unit outputs; such codes spread twice as far as those of 3 bits."""
    return random_scales(shape, 1 / (2 * CODE_SPREAD * k**0.5), device).to(DTYPE)


def marlin(shape: MoEShape, tokens: Sequence[int], device: torch.device, group: int) -> Layer:
    """vLLM's Marlin MoE kernel on symmetric int4 (``uint4b8``), called as its ``MarlinExperts`` calls it."""
    import vllm._custom_ops as vllm_ops
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
    from vllm.scalar_type import scalar_types

    def matrix(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        words = random_words((shape.experts, k // 16, n * 2), device)  # tiles of 16 x 16 codes, 8 in a word
        return words, int4_scales((shape.experts, k // group, n), k, device)

    def weighted_sum(y: torch.Tensor, out: torch.Tensor, *_: object) -> torch.Tensor:
        vllm_ops.moe_sum(y, out)
        return out

    (w1, s1), (w2, s2) = matrix(2 * shape.intermediate, shape.hidden), matrix(shape.hidden, shape.intermediate)

    def call(weights: Sequence[torch.Tensor], x: torch.Tensor, router: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return fused_marlin_moe(
            x,
            weights[0],
            weights[1],
            None,
            None,
            weights[2],
            weights[3],
            topk_weights=router,
            topk_ids=ids,
            quant_type_id=scalar_types.uint4b8.id,
            moe_sum=weighted_sum,
            output=torch.empty_like(x),
        )

    return Layer([w1, w2, s1, s2], call)


def humming(shape: MoEShape, tokens: Sequence[int], device: torch.device, bits: int, group: int, zeros: str) -> Layer:
    """Humming's indexed MoE GEMMs, in the steps of vLLM's ``HummingIndexedExperts``.

    ``bits``, ``group`` and ``zeros`` are those of :class:`benchmarks.kernels.humming_gemm.Codes`. With int4 and no zero
    points it is what vLLM runs on Hopper for a symmetric GPTQ checkpoint.
    """
    import vllm._custom_ops as vllm_ops  # noqa: F401  (registers silu_and_mul)
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size
    from vllm.model_executor.layers.fused_moe.moe_fused_mul_sum import moe_fused_mul_sum

    from benchmarks.kernels.humming_gemm import Codes, HummingGemm

    counts = [count * shape.top_k for count in tokens]
    hidden, inner, codes = shape.hidden, shape.intermediate, Codes(bits, group, zeros)
    gate_up = HummingGemm(2 * inner, hidden, shape.experts, counts, codes, device)
    down = HummingGemm(hidden, inner, shape.experts, counts, codes, device)
    first = len(gate_up.weights)

    def call(weights: Sequence[torch.Tensor], x: torch.Tensor, router: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        pairs = ids.numel()
        sorted_ids, expert_ids, padded = moe_align_block_size(
            ids, gate_up.block_rows(pairs), shape.experts, ignore_invalid_experts=True
        )
        routing = {"sorted_ids": sorted_ids, "expert_ids": expert_ids, "num_tokens_padded": padded}
        both = gate_up(weights[:first], x, pairs, top_k=shape.top_k, **routing)
        activated = torch.empty(pairs, inner, dtype=DTYPE, device=device)
        torch.ops._C.silu_and_mul(activated, both)
        y = down(weights[first:], activated, pairs, top_k=1, **routing)
        return moe_fused_mul_sum(y.view(*ids.shape, -1), router, torch.empty_like(x))

    return Layer([*gate_up.weights, *down.weights], call)


def contenders(rank: int) -> dict[str, Callable[[MoEShape, Sequence[int], torch.device], Layer]]:
    """Return every contender by its name in tables; ``rank`` is that of our experts' compensators."""
    return {
        "milo": partial(milo, rank=rank),
        "milo-no-compensators": partial(milo, rank=0),
        "bf16": bf16,
        "marlin-int4-g128": partial(marlin, group=128),
        "marlin-int4-g64": partial(marlin, group=64),
        "humming-int4-g128": partial(humming, bits=4, group=128, zeros="none"),
        "humming-uint3-g64": partial(humming, bits=3, group=64, zeros="integers"),
        "humming-uint3-float-zero-g64": partial(humming, bits=3, group=64, zeros="floats"),
        "wna16-int4-g64": wna16,
    }


DEFAULT = (
    "milo",
    "milo-no-compensators",
    "bf16",
    "marlin-int4-g128",
    "marlin-int4-g64",
    "humming-int4-g128",
    "humming-uint3-g64",
    "wna16-int4-g64",
)
