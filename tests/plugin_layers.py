"""Layers of vLLM with the plugin's methods, and the tensors that fill linear ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vllm_milo.checkpoint import CompensatorFormat, MiLoFormat, RankTable
from vllm_milo.kernels.weights import LinearSpec, LinearWeights, factor_elements, offsets

K = 256
PREFIX = "model.layers.0.self_attn"
EXPERTS = "model.layers.0.mlp.experts"


def make_format(modules: dict[str, int] | None = None, bits: int = 3, **options) -> MiLoFormat:
    return MiLoFormat(
        compensator=CompensatorFormat(bits), ranks=RankTable(0, modules or {}), ignore=("lm_head",), **options
    )


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    """Let vLLM's layers believe that this process is one of several tensor-parallel ranks."""
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear

    for module in (parameter, linear):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)


def make_layer(kind: str, fmt: MiLoFormat, widths: list[int], prefix: str, heads: int = 0, k: int = K, gathering=None):
    """Make one; with a gathering one that is quantized while it is loaded."""
    from vllm.model_executor.layers import linear

    from vllm_milo.config import MiLoConfig

    config = MiLoConfig(fmt)
    config._gathering = gathering
    options = {"bias": False, "quant_config": config, "prefix": prefix, "params_dtype": torch.float32}
    if kind == "qkv":
        head = widths[1] // heads
        return linear.QKVParallelLinear(k, head, widths[0] // head, heads, **options)
    if kind == "merged":
        return linear.MergedColumnParallelLinear(k, widths, **options)
    if kind == "row":
        return linear.RowParallelLinear(k, widths[0], **options)
    return linear.ColumnParallelLinear(k, widths[0], **options)


def routed_experts():
    """A layer of experts, without weights: it asks for its method before it makes any."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    layer = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(layer)
    layer.moe_config = SimpleNamespace()
    return layer


def checkpoint_tensors(weights: LinearWeights, spec: LinearSpec) -> list[dict[str, torch.Tensor]]:
    """The tensors of each part as a checkpoint holds them."""
    rows, ranks = offsets(spec.widths), offsets(spec.ranks)
    elements = [factor_elements(width, spec.factor_bits) for width in spec.widths]
    u = offsets([rank * row for rank, row in zip(spec.ranks, elements, strict=True)])
    scales = offsets([rank * (width // 64) for rank, width in zip(spec.ranks, spec.widths, strict=True)])
    parts = []
    for part, rank in enumerate(spec.ranks):
        block, factor = slice(rows[part], rows[part + 1]), slice(ranks[part], ranks[part + 1])
        tensors = {
            "weight_packed": weights.packed[block],
            "weight_scale": weights.scale[block],
            "weight_zero": weights.zero[block],
        }
        if rank:
            tensors["weight_u"] = weights.u[u[part] : u[part + 1]].view(rank, -1)
            tensors["weight_v"] = weights.v[factor]
        if rank and spec.factor_bits != 16:
            tensors["weight_u_scale"] = weights.u_scale[scales[part] : scales[part + 1]].view(rank, -1)
            tensors["weight_v_scale"] = weights.v_scale[factor]
        parts.append(tensors)
    return parts


def load(layer, kind: str, tensors: list[dict[str, torch.Tensor]]) -> None:
    ids = {"qkv": ["q", "k", "v"], "merged": [0, 1]}.get(kind, [None])
    for shard_id, part in zip(ids, tensors, strict=True):
        for name, tensor in part.items():
            parameter = getattr(layer, name)
            extra = () if shard_id is None else (shard_id,)
            parameter.weight_loader(parameter, tensor, *extra)


def moe_layer(**options):
    """What MiLoMoEMethod reads of a RoutedExperts layer."""
    layer = torch.nn.Module()
    layer.moe_config = SimpleNamespace(tp_rank=0, tp_size=options.pop("tp_size", 1))
    defaults = {"activation": SimpleNamespace(value="silu"), "apply_router_weight_on_input": False}
    layer.global_num_experts = 4
    layer._map_global_expert_id_to_local_expert_id = lambda expert: expert
    for name, value in {**defaults, **options}.items():
        setattr(layer, name, value)
    return layer


def create_experts(layer, fmt: MiLoFormat | None = None, intermediate: int = 128, gathering=None, **moe):
    """Create a layer's weights; with a gathering those of one that is quantized while it is loaded."""
    from vllm_milo.fused_moe import MiLoMoEMethod
    from vllm_milo.online.methods import OnlineMoEMethod

    options = {"has_bias": False, "is_act_and_mul": True, "is_lora_enabled": False, "experts_per_token": 2}
    config = SimpleNamespace(**options | moe)
    what = fmt or MiLoFormat(ranks=RankTable(8)), config, EXPERTS
    method = MiLoMoEMethod(*what) if gathering is None else OnlineMoEMethod(*what, gathering)
    method.create_weights(layer, 4, 128, intermediate, torch.float32, weight_loader=None)
    return method
