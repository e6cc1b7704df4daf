"""Linear layers inside vLLM but without an engine: tensor-parallel slices, biases, splits that are refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from plugin_layers import PREFIX, K, as_rank, checkpoint_tensors, load, make_format, make_layer
from random_layers import random_linear

from vllm_milo.checkpoint import CheckpointError, GroupTable, MiLoFormat, RankTable
from vllm_milo.kernels import reference
from vllm_milo.kernels.weights import offsets

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_rank")]

LAYERS = {
    "qkv": ([512, 128, 128], [16, 8, 0], f"{PREFIX}.qkv_proj", ["q_proj", "k_proj", "v_proj"], 2),
    "qkv replicated": ([512, 64, 64], [16, 8, 24], f"{PREFIX}.qkv_proj", ["q_proj", "k_proj", "v_proj"], 1),
    "merged": ([256, 256], [8, 24], "model.layers.0.mlp.gate_up_proj", ["gate_proj", "up_proj"], 0),
    "row": ([192], [16], f"{PREFIX}.o_proj", ["o_proj"], 0),
    "column": ([256], [0], f"{PREFIX}.q_b_proj", ["q_b_proj"], 0),
}


def outputs_of_ranks(
    kind: str,
    tp: int,
    x: torch.Tensor,
    tensors: list[dict[str, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], torch.nn.Module],
) -> list[torch.Tensor]:
    """Load and run the layer that ``make`` returns as each of ``tp`` ranks in turn."""
    found: list[torch.Tensor] = []
    for rank in range(tp):
        as_rank(monkeypatch, rank, tp)
        layer = make()
        load(layer, kind, tensors)
        layer.quant_method.process_weights_after_loading(layer)
        own = x.chunk(tp, dim=-1)[rank].contiguous() if kind == "row" else x
        found.append(layer.quant_method.apply(layer, own))
    return found


@pytest.mark.parametrize("dense", ["3bit", "16bit"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("bits", [3, 8, 16])
@pytest.mark.parametrize("name", LAYERS)
def test_ranks_together_give_the_whole_layer(
    name: str, bits: int, tp: int, dense: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VLLM_MILO_DENSE", dense)
    widths, ranks, prefix, leaves, heads = LAYERS[name]
    kind = name.split()[0]
    parent = prefix.rpartition(".")[0]
    fmt = make_format({f"{parent}.{leaf}": rank for leaf, rank in zip(leaves, ranks, strict=True)}, bits)
    weights, spec = random_linear(widths, ranks, K, 64, bits)
    x = torch.randn(5, K)
    expected = reference.linear(x, weights, spec)
    columns = offsets(widths)
    found = outputs_of_ranks(
        kind,
        tp,
        x,
        checkpoint_tensors(weights, spec),
        monkeypatch,
        lambda: make_layer(kind, fmt, widths, prefix, heads),
    )
    if kind == "row":
        torch.testing.assert_close(sum(found), expected)
        return
    for part in range(len(widths)):
        replicas = max(1, tp // heads) if kind == "qkv" and part > 0 else 1
        own = offsets([width // tp * (max(1, tp // heads) if heads and i > 0 else 1) for i, width in enumerate(widths)])
        pieces = [found[rank][:, own[part] : own[part + 1]] for rank in range(0, tp, replicas)]
        torch.testing.assert_close(torch.cat(pieces, 1), expected[:, columns[part] : columns[part + 1]])


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", ["qkv", "merged", "row"])
def test_layers_have_their_own_group_size(name: str, tp: int, monkeypatch: pytest.MonkeyPatch):
    """Groups of 64 in a checkpoint of groups of 128; a rank's share of a row's inputs is 3 groups of them."""
    widths, ranks, prefix, leaves, heads = LAYERS[name]
    parent, k = prefix.rpartition(".")[0], 384
    parts = [f"{parent}.{leaf}" for leaf in leaves]
    fmt = make_format(dict(zip(parts, ranks, strict=True)), group_size=128, groups=GroupTable(dict.fromkeys(parts, 64)))
    weights, spec = random_linear(widths, ranks, k, 64, 3)
    x = torch.randn(5, k)
    expected = reference.linear(x, weights, spec)
    found = outputs_of_ranks(
        name,
        tp,
        x,
        checkpoint_tensors(weights, spec),
        monkeypatch,
        lambda: make_layer(name, fmt, widths, prefix, heads, k),
    )
    if name == "row":
        torch.testing.assert_close(sum(found), expected)
    elif tp == 1:
        torch.testing.assert_close(found[0], expected)
    else:
        torch.testing.assert_close(found[0][:, : widths[0] // 2], expected[:, : widths[0] // 2])


def test_parts_of_different_group_sizes_are_refused():
    fmt = make_format(group_size=128, groups=GroupTable({f"{PREFIX}.q_proj": 64, f"{PREFIX}.k_proj": 64}))
    with pytest.raises(
        CheckpointError, match=r"need one group size: .*q_proj has 64, .*k_proj has 64, .*v_proj has 128"
    ):
        make_layer("qkv", fmt, [256, 64, 64], f"{PREFIX}.qkv_proj", heads=2)


def test_bias_is_added():
    weights, spec = random_linear([128], [8], K, 64, 3)
    layer = make_layer("column", make_format({f"{PREFIX}.o_proj": 8}), [128], f"{PREFIX}.o_proj")
    load(layer, "column", checkpoint_tensors(weights, spec))
    layer.quant_method.process_weights_after_loading(layer)
    x, bias = torch.randn(3, K), torch.randn(128)
    found = layer.quant_method.apply(layer, x, bias)
    torch.testing.assert_close(found, reference.linear(x, weights, spec) + bias)


@pytest.mark.parametrize(("sizes", "refused"), [({}, True), ({f"{PREFIX}.o_proj": 64}, False)])
def test_splits_are_checked_against_the_matrixs_own_groups(sizes, refused, monkeypatch: pytest.MonkeyPatch):
    """Two ranks of 192 inputs each: three groups of 64, but one and a half of 128."""
    as_rank(monkeypatch, 0, 2)
    fmt = make_format(group_size=128, groups=GroupTable(sizes))
    message = r"o_proj: tensor parallel size 2 leaves input size 192, which is not a multiple of 128"
    with pytest.raises(CheckpointError, match=message) if refused else contextlib.nullcontext():
        make_layer("row", fmt, [128], f"{PREFIX}.o_proj", k=384)


@pytest.mark.parametrize(
    ("kind", "widths", "k", "message"),
    [
        ("qkv", [256, 64, 64], K, r"k_proj: tensor parallel size 2 leaves output size 32, .* multiple of 64"),
        ("merged", [192, 192], K, r"gate_proj: tensor parallel size 2 leaves output size 96"),
        ("row", [128], 192, r"o_proj: tensor parallel size 2 leaves input size 96, .* multiple of 64"),
    ],
)
def test_splits_that_cut_a_group_are_refused(kind, widths, k, message, monkeypatch: pytest.MonkeyPatch):
    as_rank(monkeypatch, 0, 2)
    leaf = {"qkv": "qkv_proj", "merged": "gate_up_proj", "row": "o_proj"}[kind]
    fmt = MiLoFormat(ranks=RankTable(8))
    with pytest.raises(CheckpointError, match=message):
        make_layer(kind, fmt, widths, f"{PREFIX}.{leaf}", heads=2, k=k)


def test_split_of_a_layer_without_compensators_needs_only_groups(monkeypatch: pytest.MonkeyPatch):
    as_rank(monkeypatch, 0, 2)
    make_layer("qkv", MiLoFormat(), [256, 64, 64], f"{PREFIX}.qkv_proj", heads=2)


@pytest.mark.parametrize("tp", [1, 2])
def test_keys_that_are_values_too(tp: int, monkeypatch: pytest.MonkeyPatch):
    """As in Gemma-4's full attention, which has no other: vLLM loads each tensor of the keys for both."""
    from vllm_milo.config import MiLoConfig

    names = [f"{PREFIX}.{leaf}_proj" for leaf in "qk"]
    fmt = make_format(dict(zip(names, (16, 8), strict=True)))
    weights, spec = random_linear([512, 128], [16, 8], K, 64, 3)
    x = torch.randn(5, K)
    queries, keys = reference.linear(x, weights, spec).split([512, 128], -1)
    tensors = checkpoint_tensors(weights, spec)
    monkeypatch.setattr(MiLoConfig, "__init__", with_modules(MiLoConfig.__init__, set(names)))

    def make() -> torch.nn.Module:
        return make_layer("qkv", fmt, [512, 128, 128], f"{PREFIX}.qkv_proj", 2)

    found = outputs_of_ranks("qkv", tp, x, [*tensors, tensors[1]], monkeypatch, make)
    parts = [part.split([512 // tp, 128 // tp, 128 // tp], -1) for part in found]
    for expected, own in zip((queries, keys, keys), zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(own, -1), expected, atol=1e-4, rtol=1e-4)


def with_modules(init: Callable[..., None], names: set[str]) -> Callable[..., None]:
    """Return what makes a config that knows a checkpoint's modules."""

    def made(self, *arguments) -> None:
        init(self, *arguments)
        self._stored_modules = names

    return made
