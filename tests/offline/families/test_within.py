"""Text models within larger ones, for images and sound: what is beside them is copied and never taken for theirs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from folder_edits import edit_config, edit_tensors
from refusals import FAST, WEIGHTS, refused
from safetensors.torch import load_file
from tiny_families import TINY, make_family
from tiny_models import VOCABULARY

from vllm_milo.offline.checkpoint.inspect import inspect_checkpoint
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.evaluation.divergence import open_streamed
from vllm_milo.offline.evaluation.model import load_model
from vllm_milo.offline.families.table import FAMILIES
from vllm_milo.offline.nouns import Recipe
from vllm_milo.offline.ranks.policies import parse_policies
from vllm_milo.validation import validate_checkpoint

SHARD = "model-00001-of-00001.safetensors"
WITHIN = [name for name, family in FAMILIES.items() if family.text_config]


@pytest.mark.parametrize("name", WITHIN)
def test_what_is_beside_is_copied_and_ignored_as_a_whole(name: str, tmp_path: Path):
    source = make_family(name, tmp_path / "source")
    out = convert(source, tmp_path / "out", Conversion(FAST, parse_policies("uniform=8")), progress=False).out
    fmt, family = validate_checkpoint(out), FAMILIES[name]
    before, after = load_file(source / WEIGHTS), load_file(out / SHARD)
    for start in family.beside:
        names = [tensor for tensor in before if tensor.startswith(start)]
        assert names or "audio" in start  # not all of them hear
        assert all(torch.equal(before[tensor], after[tensor]) for tensor in names)
        assert all(fmt.ignores(tensor.removesuffix(".weight")) for tensor in names)
    assert not fmt.ignores(f"{family.layer_name(0)}.{family.in_block}experts")
    assert inspect_checkpoint(out)["kept_weights"] == 0
    written = json.loads((out / "config.json").read_text())
    assert written.pop("quantization_config") == fmt.to_dict()
    assert written == json.loads((source / "config.json").read_text())


@pytest.mark.parametrize("name", WITHIN)
def test_a_dtype_that_only_the_text_models_config_states(name: str, tmp_path: Path):
    """Factors in 16 bits have it."""
    source = make_family(name, tmp_path / "source", dtype=torch.float16)
    config = json.loads((source / "config.json").read_text())
    outer = FAMILIES[name].text_config[0]
    part = config[outer]
    for key in FAMILIES[name].text_config[1:]:
        part = part[key]
    part["dtype"] = "float16"
    edit_config(source, dtype=None, **{outer: config[outer]})
    recipe = Recipe(max_rounds=1, factor_bits=16)
    out = convert(source, tmp_path / "out", Conversion(recipe, parse_policies("uniform=8")), progress=False).out
    factors = {values.dtype for tensor, values in load_file(out / SHARD).items() if tensor.endswith("weight_u")}
    assert factors == {torch.float16}
    assert "dtype" not in json.loads((out / "config.json").read_text())


def test_experts_that_are_stored_transposed_and_kept(tmp_path: Path):
    """They stay as they are; transformers, which holds them the other way round, computes the same with them."""
    source = make_family("qwen3_vl_moe", tmp_path / "source")
    experts = "model.language_model.layers.0.mlp.experts"
    conversion = Conversion(FAST, parse_policies("uniform=8"), ignore=[experts])
    out = convert(source, tmp_path / "out", conversion, progress=False).out
    before, after = load_file(source / WEIGHTS), load_file(out / SHARD)
    assert torch.equal(before[f"{experts}.down_proj"], after[f"{experts}.down_proj"])
    windows = torch.randint(3, VOCABULARY, (2, 16))
    model, streamed = load_model(out), open_streamed(out, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        whole, states = model(input_ids=windows).logits, streamed.begin(windows)
        for index in range(len(streamed)):
            states = streamed.advance(index, streamed.layer(index), states, batch=2)
        assert (streamed.head()(states) - whole).abs().max() < 1e-4 * whole.abs().max()


def test_sizes_that_do_not_tell_which_side_is_which(tmp_path: Path):
    """[E, 128, 128] is either layout of gate and up, each of 64, with a hidden size of 128."""
    source = make_family("qwen3_vl_moe", tmp_path / "source")

    def edit(tensors):
        for name in [name for name in tensors if name.endswith("experts.gate_up_proj")]:
            tensors[name] = tensors[name][..., :128].contiguous()
            down = name.replace("gate_up_proj", "down_proj")
            tensors[down] = tensors[down][:, :64].contiguous()

    edit_tensors(source, WEIGHTS, edit)
    refused(source, tmp_path / "out", r"gate_up_proj of shape \[4, 128, 128\] may be \[experts, N, K\] or")


@pytest.mark.parametrize("name", WITHIN)
def test_numbers_within_are_checked(name: str, tmp_path: Path):
    source = make_family(name, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    part = config
    for key in FAMILIES[name].text_config:
        part = part[key]
    held = part["num_hidden_layers"]
    part["num_hidden_layers"] = 10**9
    (source / "config.json").write_text(json.dumps(config))
    refused(source, tmp_path / "out", "num_hidden_layers is 1000000000")
    part["num_hidden_layers"] = held + 1
    (source / "config.json").write_text(json.dumps(config))
    refused(source, tmp_path / "out", f"{FAMILIES[name].layer_name(held)}: missing".replace(".", r"\."))


def test_the_text_model_alone_under_the_whole_ones_config(tmp_path: Path):
    source = make_family("qwen3_vl_moe", tmp_path / "source")

    def edit(tensors):
        for name in list(tensors):
            tensors[name.replace("model.language_model.", "model.")] = tensors.pop(name)

    edit_tensors(source, WEIGHTS, edit)
    message = r"holds no tensor named model\.language_model\.layers\.0\.…, but e\.g\. model\.layers\.0\."
    refused(source, tmp_path / "out", message)


def test_tiny_models_are_within_others_where_the_table_says_so():
    assert {name for name, tiny in TINY.items() if tiny.around} == set(WITHIN)
