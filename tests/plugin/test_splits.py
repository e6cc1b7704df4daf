"""Tensor parallelism over sizes that fill no tile: parts are right, or refused with the sizes that work."""

from __future__ import annotations

import contextlib

import pytest
import torch
from plugin_layers import (
    EXPERTS,
    PREFIX,
    as_rank,
    checkpoint_tensors,
    create_experts,
    load,
    make_format,
    make_layer,
    moe_layer,
)
from random_layers import random_linear

from vllm_milo.checkpoint import CheckpointError, CompensatorFormat, MiLoFormat, RankTable
from vllm_milo.kernels import reference
from vllm_milo.models.parameters import Cut, require_split
from vllm_milo.offline.families.table import FAMILIES
from vllm_milo.offline.nouns import Kind, Matrix
from vllm_milo.offline.planning.splits import allowed_splits

QKV = ["q_proj", "k_proj", "v_proj"]
ODD = {
    # name: kind, layer, matrices, widths, K, group, ranks of 16-bit factors
    "row of 352": ("row", "o_proj", ["o_proj"], [128], 704, 32, [16]),
    "row of 32": ("row", "o_proj", ["o_proj"], [128], 64, 32, [0]),
    "parts of 96": ("merged", "gate_up_proj", ["gate_proj", "up_proj"], [192, 192], 128, 128, [8, 24]),
    "heads of 80": ("qkv", "qkv_proj", QKV, [640, 320, 320], 128, 64, [16, 0, 8]),
}


@pytest.mark.vllm
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", ODD)
def test_odd_parts_together_give_the_whole_layer(name: str, monkeypatch: pytest.MonkeyPatch):
    kind, layer_name, leaves, widths, k, group, ranks = ODD[name]
    tp = 4 if kind == "qkv" else 2
    names = [f"{PREFIX}.{leaf}" for leaf in leaves]
    fmt = make_format(dict(zip(names, ranks, strict=True)), 16, group_size=group)
    weights, spec = random_linear(widths, ranks, k, group, 16)
    x = torch.randn(5, k)
    found = []
    for process in range(tp):
        as_rank(monkeypatch, process, tp)
        layer = make_layer(kind, fmt, widths, f"{PREFIX}.{layer_name}", heads=4, k=k)
        load(layer, kind, checkpoint_tensors(weights, spec))
        layer.quant_method.process_weights_after_loading(layer)
        own = x.chunk(tp, dim=-1)[process].contiguous() if kind == "row" else x
        found.append(layer.quant_method.apply(layer, own))
    expected = reference.linear(x, weights, spec)
    if kind == "row":
        torch.testing.assert_close(sum(found), expected)
        return
    by_part = zip(*(one.split([width // tp for width in widths], dim=1) for one in found), strict=True)
    torch.testing.assert_close(torch.cat([torch.cat(part, 1) for part in by_part], 1), expected)


@pytest.mark.vllm
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("bits", [3, 8, 16])
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("size", [384, 704, 1408, 2112])
def test_the_plugin_takes_what_the_converter_says(size: int, group: int, rank: int, bits: int):
    """For experts of this intermediate size, over any number of processes that cut it at all."""
    fmt = MiLoFormat(group, CompensatorFormat(bits), RankTable(rank))
    w1, w2 = (f"{EXPERTS}.0.{leaf}" for leaf in ("gate_proj", "down_proj"))
    matrices = [
        Matrix(w1, Kind.ROUTED_EXPERT, size, 128, EXPERTS, 0),
        Matrix(w2, Kind.ROUTED_EXPERT, 128, size, EXPERTS, 0),
    ]
    heads = 2112  # which all these numbers divide
    said = allowed_splits(
        matrices, [], fmt, {w1: rank, w2: rank}, {"num_attention_heads": heads}, FAMILIES["qwen3_moe"]
    )
    sizes = [tp for tp in range(1, 65) if size % tp == 0 and heads % tp == 0]
    if size % group:  # no such checkpoint
        sizes = []
    for tp in sizes:
        with contextlib.nullcontext() if tp in said else pytest.raises(CheckpointError, match=f"size {tp} leaves"):
            create_experts(moe_layer(tp_size=tp), fmt, intermediate=size // tp)


@pytest.mark.vllm
@pytest.mark.usefixtures("one_rank")
def test_refused_experts_are_told_what_works():
    message = (
        r"experts w13: tensor parallel size 4 leaves output size 352, which is not a multiple of 64; "
        r"this layer can be served with -tp 1, 2, 11, 22, and with --enable-expert-parallel"
    )
    with pytest.raises(CheckpointError, match=message):
        create_experts(moe_layer(tp_size=4), MiLoFormat(32, ranks=RankTable(8)), intermediate=352)


@pytest.mark.vllm
@pytest.mark.usefixtures("one_rank")
def test_refused_heads_are_told_what_works(monkeypatch: pytest.MonkeyPatch):
    """Heads of 32 with a scale for 64 values: 2 of 8 key heads are a part, and 4 parts the most."""
    as_rank(monkeypatch, 0, 8)
    message = (
        r"q_proj: tensor parallel size 8 leaves output size 32, .* of 64; this layer can be served with -tp 1, 2, 4$"
    )
    with pytest.raises(CheckpointError, match=message):
        make_layer("qkv", MiLoFormat(ranks=RankTable(8)), [256, 256, 256], f"{PREFIX}.qkv_proj", heads=8, k=128)


def test_sizes_hold_for_all_of_a_layer():
    """The first cut allows 1, 3, 9 and the second 1, 3; what more than two processes share stays whole."""
    cuts = [Cut("a", "input size", 576, 64), Cut("b", "output size", 192, 64), Cut("c", "output size", 128, 64, 1)]
    require_split(cuts, 3)
    with pytest.raises(CheckpointError, match=r"^b: tensor parallel size 9 leaves .* with -tp 1, 3$"):
        require_split(cuts, 9)


def test_down_projections_of_latent_attention_are_not_cut():
    matrices = [
        Matrix("model.layers.0.self_attn.kv_a_proj_with_mqa", Kind.ATTENTION, 576, 7168),
        Matrix("model.layers.0.self_attn.o_proj", Kind.ATTENTION, 7168, 16384),
    ]
    ranks = {matrix.name: 16 for matrix in matrices}
    fmt = MiLoFormat(128, CompensatorFormat(3))
    family, heads = FAMILIES["deepseek_v3"], {"num_attention_heads": 128}
    assert allowed_splits(matrices, [], fmt, ranks, heads, family) == [1, 2, 4, 8, 16, 32, 64]
