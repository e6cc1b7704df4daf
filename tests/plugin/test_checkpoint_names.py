"""Modules that vLLM calls otherwise than the checkpoint does."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from plugin_layers import routed_experts
from tiny_models import make_model

from vllm_milo.checkpoint import CheckpointError, GroupTable, MiLoFormat, RankTable
from vllm_milo.models.checkpoint_names import (
    experts_in_checkpoint,
    module_in_checkpoint,
    name_in_model,
    names_in_checkpoint,
    values_of_keys,
)
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.nouns import Recipe

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_rank")]
SPARSE = "model.layers.{}.block_sparse_moe.experts"


def mapper(**tables):
    from vllm.model_executor.models.utils import WeightsMapper

    return WeightsMapper(**{f"orig_to_new_{kind}": table for kind, table in tables.items()})


@pytest.mark.parametrize(
    ("tables", "name", "original"),
    [
        ({"substr": {".conv.": ".short_conv."}}, "model.layers.0.short_conv.in_proj", "model.layers.0.conv.in_proj"),
        ({"prefix": {"model.": "language_model.model."}}, "language_model.model.a", "model.a"),
        ({"suffix": {".wg": ".gate"}}, "model.mlp.gate", "model.mlp.wg"),
        (
            {"prefix": {"backbone.": "model."}, "substr": {"mamba": "mixer"}},
            "model.layers.1.mixer.a",
            "backbone.layers.1.mamba.a",
        ),
    ],
)
def test_names_are_those_that_the_mapper_turns_into_vllms(tables, name: str, original: str):
    assert original in names_in_checkpoint(name, [mapper(**tables)])


def test_names_that_the_mapper_does_not_give_are_left_out():
    both = [mapper(prefix={"a.": "b."}), mapper(substr={".x.": ".y."})]
    assert names_in_checkpoint("b.y.c", both) == ["b.y.c", "b.x.c", "a.y.c", "a.x.c"] or set(
        names_in_checkpoint("b.y.c", both)
    ) == {"b.y.c", "b.x.c", "a.y.c", "a.x.c"}
    # "q" stays "q" under a mapper that changes only ends and beginnings that are not there
    assert names_in_checkpoint("q", [mapper(prefix={"a.": None}, suffix={".z": ".w"})]) == ["q"]


def quant_method(config, prefix: str):
    from vllm.model_executor.layers.linear import ReplicatedLinear

    return config.get_quant_method(ReplicatedLinear(64, 64, bias=False), prefix)


@pytest.mark.parametrize("pattern", [r"re:.*\.conv\..*", r"re:.*\.short_conv\..*"])
def test_patterns_match_both_names(pattern: str):
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    from vllm_milo.config import MiLoConfig
    from vllm_milo.linear import MiLoLinearMethod

    config = MiLoConfig(MiLoFormat(ignore=(pattern,)))
    config.apply_vllm_mapper(mapper(substr={".conv.": ".short_conv."}))
    assert isinstance(quant_method(config, "model.layers.0.short_conv.in_proj"), UnquantizedLinearMethod)
    assert isinstance(quant_method(config, "model.layers.0.mlp.down_proj"), MiLoLinearMethod)


@pytest.mark.parametrize("block", ["feed_forward", "mlp"], ids=["checkpoint", "vllm"])
def test_patterns_of_ranks_and_groups_match_both_names(block: str):
    """Ranks and groups of a module go by the checkpoint's name as well as by vLLM's, also in another process."""
    from vllm_milo.config import MiLoConfig

    pattern = rf"re:model\.layers\.\d\.{block}\.{{}}"
    linear, experts = pattern.format(r"w\d"), pattern.format("experts")
    ranks = RankTable(8, {linear: 16}, {experts: {"w1": 24, "w3": 24, "w2": [0, 32]}})
    groups = GroupTable({linear: 32}, {experts: {"w2": 32}})
    config = MiLoConfig(MiLoFormat(ranks=ranks, groups=groups))
    config.apply_vllm_mapper(mapper(substr={".feed_forward.": ".mlp."}))
    config = pickle.loads(pickle.dumps(config))
    method = quant_method(config, "model.layers.1.mlp.w2")
    assert (method.ranks, method.group_size) == ([16], 32)
    other = quant_method(config, "model.layers.1.attention.w2")
    assert (other.ranks, other.group_size) == ([8], 64)
    fmt = config.get_quant_method(routed_experts(), "model.layers.1.mlp.experts").format
    found = "model.layers.1.mlp.experts"
    assert fmt.ranks.of_experts(found, "w2", 2) == [0, 32]
    assert fmt.ranks.projections_of(found) == ["w1", "w3", "w2"]
    assert fmt.groups.of_experts(found, "down_proj", 64) == 32


def test_experts_are_found_by_their_layer():
    known = {SPARSE.format(0), SPARSE.format(10), "model.layers.1.mlp.experts"}
    assert experts_in_checkpoint("model.layers.0.mlp.experts", known) == SPARSE.format(0)
    assert experts_in_checkpoint("model.layers.10.mlp.experts", known) == SPARSE.format(10)
    assert experts_in_checkpoint("model.layers.1.mlp.experts", known | {SPARSE.format(1)}).endswith("1.mlp.experts")
    for unknown in ("model.layers.2.mlp.experts", "vision.layers.0.mlp.experts", "mlp.experts"):
        assert experts_in_checkpoint(unknown, known) == unknown


def test_two_blocks_of_experts_are_refused():
    known = {SPARSE.format(3), "model.layers.3.other.experts"}
    message = r"layers\.3\.mlp\.experts: the checkpoint has .*block_sparse_moe\.experts and .*other\.experts, and MiLo"
    with pytest.raises(CheckpointError, match=message):
        experts_in_checkpoint("model.layers.3.mlp.experts", known)


def test_a_module_is_found_by_its_last_part():
    layer = "model.layers.{}.mamba.{}"
    known = {layer.format(index, leaf) for index in (1, 10) for leaf in ("in_proj", "out_proj")}
    known |= {"model.layers.1.self_attn.out_proj", "model.mixer.in_proj"}
    assert module_in_checkpoint("model.layers.1.mixer.in_proj", known) == layer.format(1, "in_proj")
    assert module_in_checkpoint("model.layers.10.mixer.out_proj", known) == layer.format(10, "out_proj")
    for name in ("model.layers.1.mixer.out_proj", "model.layers.2.mixer.in_proj", "mixer.in_proj", *known):
        assert module_in_checkpoint(name, known) == name, "there are two, none, or it is known"


def test_a_module_that_checkpoints_call_otherwise():
    """Ling-2.5's latent attention, beside its linear attention, where vLLM says dense too."""
    layer = "model.layers.{}.attention.dense"
    known = {layer.format(0), layer.format(2), "model.layers.3.attention.o_proj", "model.layers.3.attention.dense"}
    assert module_in_checkpoint("model.layers.2.self_attn.o_proj", known) == layer.format(2)
    assert module_in_checkpoint("model.layers.0.self_attn.dense", known) == layer.format(0)
    assert module_in_checkpoint("model.layers.3.self_attn.o_proj", known) == "model.layers.3.attention.o_proj"
    assert module_in_checkpoint("model.layers.1.self_attn.o_proj", known) == "model.layers.1.self_attn.o_proj"


def test_layers_that_are_not_called_what_they_are():
    """vLLM's Step-3 leaves out what its own stand below, and its Aria names more than that."""
    text, whole = ("Step3TextForCausalLM",), ("Step3VLForConditionalGeneration",)
    assert name_in_model(".layers.0.moe.experts", text) == "model.layers.0.moe.experts"
    assert name_in_model("language_model.layers.0.moe", whole) == "language_model.model.layers.0.moe"
    assert name_in_model("language_model.model.layers.0.moe", whole) == "language_model.model.layers.0.moe"
    assert name_in_model("language_model.layers.0.moe", text) == "language_model.model.layers.0.moe"
    aria = ("AriaForConditionalGeneration",)
    assert name_in_model("language_model.model.layers.0.mlp.experts", aria) == "language_model.layers.0.mlp.experts"
    assert name_in_model("language_model.layers.0.mlp.experts", aria) == "language_model.layers.0.mlp.experts"
    assert name_in_model(".layers.0.moe", ("Step3p5ForCausalLM",)) == ".layers.0.moe"
    assert name_in_model("draft_model.model.layers.0.moe") == "model.layers.0.moe"


def test_keys_are_values_where_there_are_no_others():
    q, k, v = (f"model.layers.1.self_attn.{leaf}_proj" for leaf in "qkv")
    assert values_of_keys([q, k, v], {q, k}) == [q, k, k]
    for known in ({q, k, v}, {q}, set()):
        assert values_of_keys([q, k, v], known) == [q, k, v]
    gate = ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]
    assert values_of_keys(gate, {q, k}) == gate


TABLES = {
    "ranks": MiLoFormat(ranks=RankTable(0, {}, {SPARSE.format(1): {"w1": 8}})),
    "groups": MiLoFormat(groups=GroupTable({}, {SPARSE.format(1): {"w2": 32}})),
}


@pytest.mark.parametrize("table", TABLES)
def test_tables_name_the_experts(table: str):
    from vllm_milo.config import MiLoConfig

    method = MiLoConfig(TABLES[table]).get_quant_method(routed_experts(), "model.layers.1.mlp.experts")
    assert method.prefix == SPARSE.format(1)


def test_ignored_experts_under_another_name():
    from vllm_milo.config import MiLoConfig

    config = MiLoConfig(MiLoFormat(ignore=(SPARSE.format(1),)))
    assert config.get_quant_method(routed_experts(), "model.layers.1.mlp.experts") is None
    assert config.get_quant_method(routed_experts(), "model.layers.2.mlp.experts") is not None


def test_files_name_the_experts_where_no_table_does(tmp_path: Path):
    from vllm_milo.config import MiLoConfig

    out = convert(make_model("mixtral", tmp_path / "source"), tmp_path / "out", Conversion(Recipe("rtn"))).out
    config = MiLoConfig(MiLoFormat(ignore=(r"re:.*1\.block_sparse_moe\.experts",)))
    config.maybe_update_config(str(out))
    config.apply_vllm_mapper(mapper(prefix={"model.": "text.model."}))
    method = config.get_quant_method(routed_experts(), "text.model.layers.0.mlp.experts")
    assert method.prefix == "text.model.layers.0.block_sparse_moe.experts"
    assert config.get_quant_method(routed_experts(), "text.model.layers.1.mlp.experts") is None
