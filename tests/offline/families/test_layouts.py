"""What files hold beside the published layout: names in transformers' memory, layers that predict further tokens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from folder_edits import edit_config, edit_tensors
from refusals import FAST, WEIGHTS, refused
from safetensors.torch import load_file
from tiny_families import TINY, has_class, make_family
from tiny_models import VOCABULARY, fuse_experts

from vllm_milo.offline.checkpoint.inspect import inspect_checkpoint
from vllm_milo.offline.conversion import Conversion, Text
from vllm_milo.offline.convert import convert
from vllm_milo.offline.evaluation.verify import verify_checkpoint
from vllm_milo.offline.families.table import FAMILIES
from vllm_milo.offline.learn.layer import LearnOptions
from vllm_milo.offline.ranks.policies import parse_policies
from vllm_milo.validation import validate_checkpoint
from vllm_milo.values import CheckpointError

SHARD = "model-00001-of-00001.safetensors"
RENAMED = [name for name, family in FAMILIES.items() if family.renames]
PUBLISHED = [
    name if name in RENAMED else pytest.param(name, marks=pytest.mark.slow)
    for name, tiny in TINY.items()
    if tiny.made_of is None and has_class(name) and not FAMILIES[name].stacks and not FAMILIES[name].body_in_memory
]
LATER = [name for name, family in FAMILIES.items() if "model.layers.+" in family.ahead]
TEXT = Text("random", torch.randint(3, VOCABULARY, (3, 16)), LearnOptions(steps=1, batch=2))


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_in_memory_give_the_same_checkpoint(name: str, tmp_path: Path):
    source = make_family(name, tmp_path / "source")
    held = [
        {key: values for key, values in load_file(out / SHARD).items() if FAMILIES[name].whole_pattern(key, 2) is None}
        for out in (
            convert(folder, tmp_path / out, Conversion(FAST), progress=False).out
            for folder, out in ((source, "one"), (fuse_experts(source, tmp_path / "memory"), "other"))
        )
    ]
    assert held[0].keys() == held[1].keys()
    for key, values in held[0].items():
        assert torch.equal(values, held[1][key].reshape(values.shape)), key


def test_a_body_with_its_name_in_memory(tmp_path: Path):
    """No file that save_pretrained writes has it."""
    fused = fuse_experts(make_family("nemotron_h", tmp_path / "source"), tmp_path / "memory")
    refused(
        fused, tmp_path / "out", r"holds no tensor named backbone\.layers\.0\.…, but e\.g\. model\.layers\.0\.mixer"
    )


def test_experts_have_a_gate_where_the_config_does_not_say_otherwise(tmp_path: Path):
    """vLLM would take an up projection for a gate."""
    out = convert(make_family("nemotron_h", tmp_path / "source"), tmp_path / "out", Conversion(FAST)).out
    assert validate_checkpoint(out)
    edit_config(out, mlp_hidden_act="silu")
    with pytest.raises(CheckpointError, match=r"mixer\.experts: expected a gate, an up and a down projection, found"):
        validate_checkpoint(out)
    other = convert(make_family("olmoe", tmp_path / "other"), tmp_path / "gated", Conversion(FAST)).out
    edit_config(other, mlp_hidden_act="relu2")
    with pytest.raises(
        CheckpointError, match=r"expected an up and a down projection alone, by config\.json's mlp_hidden"
    ):
        validate_checkpoint(other)


def add_later_layer(folder: Path) -> list[str]:
    """Add a layer like the last one after it, with what predicts a further token; returns the names of its tensors."""
    added: list[str] = []

    def edit(tensors):
        later = {k.replace("layers.1.", "layers.2."): v.clone() for k, v in tensors.items() if "layers.1." in k}
        later["model.layers.2.eh_proj.weight"] = torch.ones(128, 256, dtype=torch.bfloat16)
        later["model.layers.2.enorm.weight"] = torch.ones(128, dtype=torch.bfloat16)
        later["model.layers.2.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
        tensors.update(later)
        added.extend(later)

    edit_tensors(folder, WEIGHTS, edit)
    return added


@pytest.mark.parametrize("text", [None, TEXT], ids=["plain", "text"])
@pytest.mark.parametrize("name", ["glm4_moe", "minimax_m2"])
def test_later_layers_are_kept_as_a_whole(name: str, text: Text | None, tmp_path: Path):
    source = make_family(name, tmp_path / "source")
    edit_config(source, num_hidden_layers=2)
    if name == "minimax_m2":
        edit_config(source, num_mtp_modules=1)
    added = add_later_layer(source)
    conversion = Conversion(FAST, parse_policies("uniform=8"), text=text)
    out = convert(source, tmp_path / "out", conversion, progress=False).out
    written, held = load_file(out / SHARD), load_file(source / WEIGHTS)
    assert all(torch.equal(written[key], held[key]) for key in added)
    fmt = validate_checkpoint(out)
    assert fmt.ignore[-1] == r"re:model\.layers\.2\..*"
    assert not fmt.ignores("model.layers.1.self_attn.q_proj")
    assert "model.layers.1.self_attn.q_proj.weight_packed" in written
    assert inspect_checkpoint(out)["kept_weights"] == 0
    assert verify_checkpoint(out, source).good


@pytest.mark.parametrize("name", LATER)
def test_every_family_with_later_layers(name: str):
    family = FAMILIES[name]
    body = family.body
    whole = rf"re:{re.escape(body)}\.layers\.61\..*"
    assert family.whole_pattern(f"{body}.layers.61.mlp.experts.0.w1.weight", 61) == whole
    assert family.whole_pattern(f"{body}.layers.60.mlp.experts.0.w1.weight", 61) is None
    assert family.whole_pattern(f"{body}.layers.61.eh_proj.weight", None) is None
    assert family.whole_pattern(f"{body}.norm.weight", 61) is None


@pytest.mark.parametrize(("name", "start"), [("exaone_moe", "mtp."), ("ernie4_5_moe", "model.mtp_")])
def test_what_predicts_further_tokens_beside_the_model(name: str, start: str, tmp_path: Path):
    source = make_family(name, tmp_path / "source")
    extra = {f"{start}block.layers.0.{part}.weight": torch.ones(64, 64) for part in ("eh_proj", "mlp.up_proj")}
    edit_tensors(source, WEIGHTS, lambda tensors: tensors.update(extra))
    out = convert(source, tmp_path / "out", Conversion(FAST), progress=False).out
    written = load_file(out / SHARD)
    assert all(torch.equal(written[key], values) for key, values in extra.items())
    assert validate_checkpoint(out).ignore[-1] == "re:" + start.replace(".", r"\.") + ".*"


def test_later_layers_of_families_that_have_none(tmp_path: Path):
    source = make_family("dots1", tmp_path / "source")
    add_later_layer(source)
    refused(source, tmp_path / "out", r"model\.layers\.2: extra, config\.json states num_hidden_layers 2")


@pytest.mark.parametrize("name", ["qwen3_next", "jamba"])
def test_a_layer_without_what_mixes_tokens(name: str, tmp_path: Path):
    source = make_family(name, tmp_path / "source")
    mixer = FAMILIES[name].mixers[1]

    def edit(tensors):
        for key in [key for key in tensors if f".{mixer}." in key]:
            del tensors[key]

    edit_tensors(source, WEIGHTS, edit)
    refused(source, tmp_path / "out", rf"model\.layers\.0: must have one of self_attn and {mixer}, has neither")


def test_a_weight_that_the_table_does_not_know(tmp_path: Path):
    """Before any work, whatever it is called."""
    source = make_family("afmoe", tmp_path / "source")
    name = "model.layers.1.self_attn.g_proj.weight"
    edit_tensors(source, WEIGHTS, lambda tensors: tensors.update({name: torch.ones(64, 128, dtype=torch.bfloat16)}))
    edit_tensors(source, WEIGHTS, lambda tensors: tensors.update({name.replace("1", "0"): tensors[name].clone()}))
    refused(source, tmp_path / "out", r"self_attn\.g_proj\.weight.*: a weight that afmoe does not have")


def test_transposed_fused_experts(tmp_path: Path):
    """Some families store [E, K, N]; taken for [E, N, K] the others' would be quantized along the wrong side."""
    source = make_family("mellum", tmp_path / "source")
    fused = fuse_experts(source, tmp_path / "fused")

    def edit(tensors):
        for key in [key for key in tensors if tensors[key].dim() == 3]:
            tensors[key] = tensors[key].mT.contiguous()

    edit_tensors(fused, WEIGHTS, edit)
    message = r"experts\.down_proj have shape \[4, 192, 128\], but the hidden size 128 must be the second .* transposed"
    refused(fused, tmp_path / "out", message)


def test_a_list_with_a_number_for_each_layer(tmp_path: Path):
    """As in Hunyuan-A13B."""
    source = make_family("hunyuan_v1_moe", tmp_path / "source")
    edit_config(source, moe_intermediate_size=[192, 192], moe_topk=[2, 2])
    assert convert(source, tmp_path / "out", Conversion(FAST), progress=False).matrices == 38
    edit_config(source, moe_intermediate_size=[192, "many"])
    refused(source, tmp_path / "other", r"moe_intermediate_size is 'many', but must be a whole number")


def test_what_transformers_stacks_has_its_place_there():
    family = FAMILIES["kimi_linear"]
    name = "model.layers.3.self_attn.{}conv1d.weight"
    assert family.stacked_place(name.format("k_")) == (name.format(""), 1, 3)
    for other in (name.format(""), "self_attn.k_conv1d.weight", "model.layers.3.self_attn.k_proj.weight"):
        assert family.stacked_place(other) is None


def test_a_router_chooses_among_experts_without_weights_too(tmp_path: Path):
    source = make_family("longcat_flash", tmp_path / "source")
    edit_config(source, zero_expert_num=3)
    refused(
        source, tmp_path / "out", r"classifier\.weight has shape \[6, 256\], but there are 7 experts to choose from"
    )
    edit_config(source, zero_expert_num=2, num_layers=3)
    refused(source, tmp_path / "out", r"model\.layers\.2: missing")
