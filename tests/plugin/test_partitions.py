"""Tensors of a checkpoint that cover several partitions of a fused layer."""

from __future__ import annotations

import pytest
import torch
from plugin_layers import K, as_rank, checkpoint_tensors, make_format
from random_layers import random_linear

from vllm_milo.checkpoint import CheckpointError
from vllm_milo.kernels import reference
from vllm_milo.models.partitions import spans_of

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_rank")]

LAYERS = {
    # vLLM's name, its partitions, the checkpoint's tensors, their shard ids and ranks
    "in_proj_qkvz": ([128, 128, 256, 256], ["in_proj_qkv", "in_proj_z"], [(0, 1, 2), 3], [16, 8]),
    "input_linear": ([256, 256], ["input_linear"], [None], [24]),
    "in_proj": ([128, 256, 128], ["in_proj"], [None], [0]),
    "query_key_value": ([512, 128, 128], ["query_key_value"], [None], [16]),
}


def make_layer(name: str, bits: int):
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear

    from vllm_milo.config import MiLoConfig

    partitions, parts, _, ranks = LAYERS[name]
    config = MiLoConfig(make_format({f"layers.0.{part}": rank for part, rank in zip(parts, ranks, strict=True)}, bits))
    config.packed_modules_mapping = {name: parts}
    options = {"bias": False, "quant_config": config, "prefix": f"layers.0.{name}", "params_dtype": torch.float32}
    if name == "query_key_value":
        return QKVParallelLinear(K, 64, 8, 2, **options)
    return MergedColumnParallelLinear(K, partitions, **options)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("bits", [3, 8, 16])
@pytest.mark.parametrize("name", LAYERS)
def test_ranks_together_give_the_whole_layer(name: str, bits: int, tp: int, monkeypatch: pytest.MonkeyPatch):
    partitions, _, ids, ranks = LAYERS[name]
    of_tensor = [len(shard) if isinstance(shard, tuple) else 1 if shard is not None else None for shard in ids]
    widths = [sum(partitions)] if of_tensor == [None] else [sum(partitions[:3]), partitions[3]]
    weights, spec = random_linear(widths, ranks, K, 64, bits)
    x = torch.randn(5, K)
    expected = reference.linear(x, weights, spec).split(partitions, 1)
    found = []
    for rank in range(tp):
        as_rank(monkeypatch, rank, tp)
        layer = make_layer(name, bits)
        for shard_id, tensors in zip(ids, checkpoint_tensors(weights, spec), strict=True):
            for leaf, tensor in tensors.items():
                parameter = getattr(layer, leaf)
                parameter.weight_loader(parameter, tensor, *(() if shard_id is None else (shard_id,)))
        layer.quant_method.process_weights_after_loading(layer)
        found.append(layer.quant_method.apply(layer, x).split([width // tp for width in partitions], 1))
    for partition, outputs in enumerate(expected):
        torch.testing.assert_close(torch.cat([one[partition] for one in found], 1), outputs)


def test_partitions_that_tell_nothing_are_refused():
    message = r"a\.mixed: vLLM fuses 3 matrices here, MiLo knows .*convert the model with --ignore 're:\.\*\\\.\(mixed"
    with pytest.raises(CheckpointError, match=message):
        spans_of("a.mixed", ["a.x", "a.y"], 3)
    with pytest.raises(CheckpointError, match="vLLM fuses 3 matrices here"):
        spans_of("a.in_proj_qkvz", ["a.in_proj_qkv", "a.in_proj_z"], 3)


@pytest.mark.parametrize(("name", "shard_id"), [("in_proj_qkvz", (0, 1)), ("in_proj_qkvz", None), ("input_linear", 0)])
def test_tensors_of_other_partitions_are_refused(name: str, shard_id):
    layer = make_layer(name, 3)
    with pytest.raises(CheckpointError, match=rf"layers\.0\.{name}: MiLo expects .*, but vLLM loads .* --ignore 're:"):
        layer.weight_packed.weight_loader(layer.weight_packed, torch.zeros(1, 1), shard_id)


def test_splits_of_every_partition_are_checked(monkeypatch: pytest.MonkeyPatch):
    """Four ranks leave 32 outputs of the first partition, which cuts a scale of U."""
    as_rank(monkeypatch, 0, 4)
    with pytest.raises(CheckpointError, match=r"in_proj_qkv: tensor parallel size 4 leaves output size 32"):
        make_layer("in_proj_qkvz", 3)
