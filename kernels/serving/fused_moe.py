"""The routed experts of one layer on Triton. At decode seven launches, of which 2 and 5 run beside 3 and 6:

0. choose: the experts of tokens, where the layer gets their router's logits, and 1 does not choose for few tokens
1. prepare: sums of x, which every tile of the first GEMM needs whole, and x in the order of lanes, or x in fp16; sorts
   the pairs as well, and sets the counters of 2 and 5 to 0
2. project: V13·x, which the epilogues of the first GEMM need
3. gemm: gate and up, with U13 in the epilogue
4. activate: h = act(gate)·up, its sums and h in the order of lanes, after the biases of gate and up
5. project: V2·h
6. gemm: down, with U2 in the epilogue
7. weighted_sum: over top-k, after the biases of down

With more tokens of a bf16 model 3 applies the activation itself, and hidden activations are read and written once; not
where gate and up have biases or the activation is not plain: such outputs have no bound by norms alone.
"""

from __future__ import annotations

import torch

from ..launch import launch_mode
from ..weights import MoEShape, MoESpec
from .activation import activate
from .choose import FEW_EXPERTS, FEW_TOKENS, Choice, choose
from .dispatch import moe_configs
from .gemm.config import GemmConfig
from .gemm.launcher import gemm, gemm_gated
from .layout import KernelWeights
from .padding import cut_outputs, pad_inputs
from .prepare import MAX_ROW, prepare
from .projection.launcher import project
from .projection.plan import DownShape
from .reduce import weighted_sum
from .routing import Routes

FEW_PAIRS = 16384
"""Up to so many pairs the latency of launches matters, and they start early."""


def fused_moe(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    w13: list[torch.Tensor],
    w2: list[torch.Tensor],
    spec: MoESpec,
    configs: tuple[GemmConfig, GemmConfig] | None = None,
    choice: Choice | None = None,
) -> torch.Tensor:
    """Return the routed experts' weighted sum; arguments as in :func:`..reference.fused_moe`.

    ``w13`` and ``w2`` are :class:`.layout.KernelWeights`. Every shape depends on the shapes of the arguments
    alone, and nothing waits for the host, so the launches can be captured in a CUDA graph. ``configs`` forces
    the tiles of the two GEMMs, which must agree in block_m; by a ``choice`` ids and weights are written first, see
    :func:`.prepare.prepare`. The same input gives the same bits.
    """
    gate_up, down = KernelWeights(*w13), KernelWeights(*w2)
    tokens, top_k = topk_ids.shape
    if tokens == 0:
        return torch.empty_like(x)
    routes = Routes(topk_ids.contiguous(), expert_map)
    x = x.contiguous()
    pairs_per_row = top_k
    if spec.router_weight_on_input:
        x = (x.unsqueeze(1) * topk_weights.unsqueeze(-1)).to(x.dtype).flatten(0, 1)
        pairs_per_row = 1
    hidden_size = x.shape[1]
    x = pad_inputs(x)
    num_experts = gate_up.packed.shape[0]
    may_be_fast = spec.is_plain and gate_up.bias is None and x.dtype == torch.bfloat16
    if configs is None:
        held = 1.0 if expert_map is None else num_experts / expert_map.numel()
        shape = moe_shape(gate_up, down, spec, top_k)
        configs = moe_configs(tokens, shape, held, x.device, x.dtype, may_be_fast)
    fast = may_be_fast and _is_fast(x.shape[1], gate_up, down, *configs)
    first, second = configs if fast else (config.by_products for config in configs)
    mode = launch_mode(x.device, few_tokens=routes.num_pairs <= FEW_PAIRS)
    rank13, rank2 = spec.max_ranks
    downs = [DownShape(rank13, gate_up.units, first.split_k), DownShape(rank2, down.units, second.split_k)]
    formats = [(weights.group_size, spec.factor_bits) for weights in (gate_up, down)]
    dtype = x.dtype
    needs_sums, reads_lanes = first.needs_sums(gate_up.group_size), first.reads_lanes(gate_up.group_size)
    source, blocks, (planned13, planned2) = prepare(
        x, routes, num_experts, first.block_m, gate_up.group_size, fast, needs_sums, reads_lanes, downs, mode,
        choice,
    )  # fmt: skip
    down13 = project(source, gate_up, blocks, routes, pairs_per_row, spec.factor_bits, planned13, mode)
    common = (source._replace(down=down13), gate_up, blocks, routes, pairs_per_row, *formats[0], first, mode)
    if fast:
        source = gemm_gated(*common, spec.activation)
    else:
        y = gemm(*common, dtype, [gate_up.columns // 2] * 2 if spec.is_gated else [gate_up.columns])
        reads_lanes = second.reads_lanes(down.group_size)
        source = activate(y, spec, gate_up.bias, routes, down.group_size, reads_lanes, dtype, mode)
    down2 = project(source, down, blocks, routes, 1, spec.factor_bits, planned2, mode)
    source = source._replace(down=down2)
    y = gemm(source, down, blocks, routes, 1, *formats[1], second, mode, dtype, [down.columns])
    out = weighted_sum(y, down.bias, topk_weights.contiguous(), routes, not spec.router_weight_on_input, dtype, mode)
    return cut_outputs(out, [hidden_size])


def routed_moe(
    x: torch.Tensor,
    logits: torch.Tensor,
    padding: torch.Tensor | None,
    top_k: int,
    renormalizes: bool,
    expert_map: torch.Tensor | None,
    w13: list[torch.Tensor],
    w2: list[torch.Tensor],
    spec: MoESpec,
) -> torch.Tensor:
    """Return the weighted sum of experts that the router's logits choose; arguments as in :func:`..ops.routed_moe`.

    Raises:
        ValueError: logits or padding are not of these tokens and experts.
    """
    tokens = x.shape[0]
    experts = KernelWeights(*w13).packed.shape[0] if expert_map is None else expert_map.numel()
    if logits.shape != (tokens, experts) or (padding is not None and padding.shape != (tokens,)):
        given = list(logits.shape), None if padding is None else list(padding.shape)
        raise ValueError(f"logits and padding are {given[0]} and {given[1]}, of {tokens} tokens and {experts} experts")
    if tokens == 0:
        return torch.empty_like(x)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=x.device)
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=x.device)
    choice = Choice(logits.contiguous(), None if padding is None else padding.view(torch.uint8), renormalizes, weights)
    few = tokens <= FEW_TOKENS and experts <= FEW_EXPERTS[logits.element_size()]
    if few and expert_map is None and not spec.router_weight_on_input:
        return fused_moe(x, weights, ids, expert_map, w13, w2, spec, choice=choice)
    choose(choice, Routes(ids, expert_map), launch_mode(x.device, few_tokens=ids.numel() <= FEW_PAIRS))
    return fused_moe(x, weights, ids, expert_map, w13, w2, spec)


def moe_shape(gate_up: KernelWeights, down: KernelWeights, spec: MoESpec, top_k: int) -> MoEShape:
    """Return what decides a layer's tiles."""
    first, second = spec.max_ranks
    parts = 2 if spec.is_gated else 1
    groups = (gate_up.group_size, down.group_size)
    experts, intermediate = gate_up.packed.shape[0], gate_up.columns // parts
    return MoEShape(experts, top_k, down.columns, intermediate, groups, (first, second), parts)


def _is_fast(k: int, gate_up: KernelWeights, down: KernelWeights, first: GemmConfig, second: GemmConfig) -> bool:
    """Whether both GEMMs, the first one's rows being of k, have tiles that scale weights in fp16."""
    whole = first.split_k == 1 and max(k, down.units * 128) <= MAX_ROW
    scaled = first.scales_weights(gate_up.group_size) and second.scales_weights(down.group_size)
    return scaled and whole
