"""Every kind of bad source model or option: what is wrong, where, and nothing left behind."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from folder_edits import edit_config, edit_tensors, narrow_down_projections
from refusals import FAST, Q_PROJ, WEIGHTS, refused
from safetensors.torch import load_file
from tiny_models import make_model

from vllm_milo.checkpoint import CheckpointError
from vllm_milo.offline.checkpoint.inspect import inspect_checkpoint
from vllm_milo.offline.conversion import Conversion, Text
from vllm_milo.offline.convert import convert
from vllm_milo.offline.learn.layer import LearnOptions
from vllm_milo.offline.nouns import Recipe
from vllm_milo.offline.ranks.policies import parse_policies
from vllm_milo.shards import ShardError, read_json


def test_truncated_source(source: Path, tmp_path: Path):
    content = (source / WEIGHTS).read_bytes()
    (source / WEIGHTS).write_bytes(content[:-100])
    refused(source, tmp_path / "out", r"model\.safetensors: truncated: \d+ bytes, but its header", error=ShardError)


def test_source_that_is_no_safetensors(source: Path, tmp_path: Path):
    (source / WEIGHTS).write_bytes(b"\x80\x02}q\x00." * 10)
    refused(source, tmp_path / "out", "truncated or not a safetensors file", error=ShardError)


def test_source_without_weights(source: Path, tmp_path: Path):
    (source / WEIGHTS).rename(source / "pytorch_model.bin")
    refused(source, tmp_path / "out", r"holds no \*\.safetensors file", error=ShardError)


def test_index_names_a_missing_tensor(source: Path, tmp_path: Path):
    index = {"weight_map": dict.fromkeys([*load_file(source / WEIGHTS), "model.layers.9.x.weight"], WEIGHTS)}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(source, tmp_path / "out", r"tensor model\.layers\.9\.x\.weight is missing, but .*index", error=ShardError)


def test_index_names_a_missing_file(source: Path, tmp_path: Path):
    index = {"weight_map": dict.fromkeys(load_file(source / WEIGHTS), "model-00002-of-00002.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(source, tmp_path / "out", r"model-00002-of-00002\.safetensors: no such file", error=ShardError)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (Q_PROJ, r"model\.layers\.0\.self_attn\.q_proj\.weight: missing"),
        ("model.layers.1.input_layernorm.weight", r"model\.layers\.1\.input_layernorm\.weight: missing"),
        (
            "model.layers.1.block_sparse_moe.experts.3.w2.weight",
            "4 experts, but w2 is there for 3; expert 3 is missing",
        ),
        ("model.norm.weight", r"model\.norm\.weight: missing"),
        ("lm_head.weight", r"lm_head\.weight: missing"),
    ],
)
def test_missing_tensor(source: Path, tmp_path: Path, name: str, message: str):
    edit_tensors(source, WEIGHTS, lambda tensors: tensors.pop(name))
    refused(source, tmp_path / "out", message)


def test_missing_layer(source: Path, tmp_path: Path):
    edit_config(source, num_hidden_layers=3)
    refused(source, tmp_path / "out", r"model\.layers\.2: missing")
    edit_config(source, num_hidden_layers=0)
    refused(source, tmp_path / "out", r"model\.layers\.0: extra, config\.json states num_hidden_layers 0")


def test_routers_that_are_missing_or_choose_among_others(source: Path, tmp_path: Path):
    routers = [f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(2)]
    narrow = {name: torch.zeros(3, 128) for name in routers}
    edit_tensors(source, WEIGHTS, lambda tensors: tensors.update(narrow))
    message = rf"tensor {re.escape(routers[0])} has shape \[3, 128\], but there are 4 experts to choose from"
    refused(source, tmp_path / "out", message)
    edit_tensors(source, WEIGHTS, lambda tensors: [tensors.pop(name) for name in routers])
    refused(source, tmp_path / "out", rf"^{re.escape(routers[0])}: missing; are the model's files complete")


def test_wrong_expert_shape(source: Path, tmp_path: Path):
    def edit(tensors):
        for layer in range(2):
            name = f"model.layers.{layer}.block_sparse_moe.experts.1.w1.weight"
            tensors[name] = tensors[name][:64].clone()

    edit_tensors(source, WEIGHTS, edit)
    refused(source, tmp_path / "out", r"experts: w1 has experts of different shapes: \[\(64, 128\), \(128, 128\)\]")


@pytest.mark.parametrize("name", ["self_attn.q_proj.weight", "input_layernorm.weight", "block_sparse_moe.gate.weight"])
def test_wrong_shape(source: Path, tmp_path: Path, name: str):
    first, second = (f"model.layers.{layer}.{name}" for layer in range(2))
    edit_tensors(source, WEIGHTS, lambda tensors: tensors.update({second: tensors[second][1:].clone()}))
    message = rf"{second} has shape \[.*\], but {first} has \[.*\]".replace(".weight", r"\.weight")
    refused(source, tmp_path / "out", message)


def test_wrong_dimensions(source: Path, tmp_path: Path):
    edit_tensors(source, WEIGHTS, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ][None].clone()}))
    refused(source, tmp_path / "out", r"q_proj\.weight must have 2 dimensions, found \[1, 256, 128\]")


def test_wrong_dtype(source: Path, tmp_path: Path):
    edit_tensors(source, WEIGHTS, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].to(torch.int8)}))
    refused(source, tmp_path / "out", r"q_proj\.weight is I8; weights must be one of BF16, F16, F32")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [Q_PROJ, "model.embed_tokens.weight", "model.norm.weight"])
def test_not_finite(source: Path, tmp_path: Path, name: str, value: float):
    def edit(tensors):
        tensors[name].view(-1)[5] = value

    edit_tensors(source, WEIGHTS, edit)
    refused(source, tmp_path / "out", rf"tensor {name} holds NaN or Inf")


def test_scale_that_does_not_fit_names_tensor_and_group(source: Path, tmp_path: Path):
    def edit(tensors):
        tensors[Q_PROJ][3, 70] = 1e7

    edit_tensors(source, WEIGHTS, edit)
    refused(source, tmp_path / "out", r"model\.layers\.0\.self_attn\.q_proj: group 1 of row 3 needs scale")


def test_unknown_family(source: Path, tmp_path: Path):
    edit_config(source, model_type="dbrx_moe")
    refused(source, tmp_path / "out", "'dbrx_moe' is a MoE family that MiLo does not know; `milo families` lists")


def test_not_a_moe(source: Path, tmp_path: Path):
    edit_config(source, model_type="llama", num_local_experts=None)
    refused(source, tmp_path / "out", "'llama' is not a Mixture-of-Experts model")


def test_no_config(source: Path, tmp_path: Path):
    (source / "config.json").unlink()
    refused(
        source, tmp_path / "out", r"config\.json: no such file; is .* a Hugging Face model folder", error=ShardError
    )


@pytest.mark.parametrize("name", ["model-Q4_K_M.gguf", "pytorch_model.bin"])
def test_weights_in_other_formats_are_named(source: Path, tmp_path: Path, name: str):
    (source / WEIGHTS).rename(source / name)
    said = rf"source: holds no \*\.safetensors file but {name}; other weight formats are not read, give the model in"
    refused(source, tmp_path / "out", said, error=ShardError)
    (source / "config.json").unlink()
    said = rf"config\.json: no such file; .*source holds {name}, which is not read; give the model in safetensors"
    refused(source, tmp_path / "out", said, error=ShardError)


def test_a_file_in_place_of_the_folder(source: Path, tmp_path: Path):
    refused(source / WEIGHTS, tmp_path / "out", "safetensors: is a file; give the model's folder, with config.json")


def test_a_config_that_is_there_asks_for_no_list_of_its_folder(source: Path, monkeypatch: pytest.MonkeyPatch):
    """Which may hold thousands of files, or may not be listed."""
    monkeypatch.setattr(Path, "iterdir", lambda _: pytest.fail("the folder was listed"))
    assert read_json(source / "config.json")["model_type"]


def test_config_that_is_not_json(source: Path, tmp_path: Path):
    (source / "config.json").write_text("{")
    refused(source, tmp_path / "out", r"config\.json: not valid JSON", error=ShardError)


def test_no_folder(tmp_path: Path):
    refused(tmp_path / "nowhere", tmp_path / "out", "nowhere: no such folder; download the model first")


def test_quantized_source(checkpoint: Path, tmp_path: Path):
    refused(checkpoint, tmp_path / "out", r"the model is quantized already \(milo\); convert the original")


def test_input_size_that_no_group_divides(tmp_path: Path):
    source = make_model("qwen2_moe", tmp_path / "source")
    narrow_down_projections(source, WEIGHTS)
    message = r"experts\.0\.down_proj: shape \[128, 80\] is not a multiple of 64 in both dimensions; keep this layer"
    refused(source, tmp_path / "out", message, Conversion(Recipe(group_size=128)), CheckpointError)


def test_ignore_that_matches_nothing(source: Path, tmp_path: Path):
    conversion = Conversion(FAST, ignore=["model.layers.0.self_atn.q_proj"])
    refused(source, tmp_path / "out", r"--ignore 'model\.layers\.0\.self_atn\.q_proj' matches no layer", conversion)


def test_ignore_of_a_part_of_a_fused_layer(source: Path, tmp_path: Path):
    conversion = Conversion(FAST, ignore=["model.layers.0.self_attn.q_proj"])
    refused(source, tmp_path / "out", r"q_proj but not .*k_proj: vLLM fuses these layers", conversion)


def test_frequency_without_counts(source: Path, tmp_path: Path):
    conversion = Conversion(FAST, parse_policies("frequency=8"))
    refused(source, tmp_path / "out", "needs --expert-counts FILE.json; make it with `milo stats", conversion)


BROKEN_JSON = {"list": b"[]", "null": b"null", "number": b"7", "UTF-8": b'{"a": "\xff\xfe"}', "nothing": b""}


@pytest.mark.parametrize("content", BROKEN_JSON.values(), ids=list(BROKEN_JSON))
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "tokenizer_config.json", "generation_config.json"]
)
def test_files_that_hold_something_else(source: Path, tmp_path: Path, name: str, content: bytes):
    (source / name).write_bytes(content)
    message = rf"{name}: (must hold a JSON object, found|not valid JSON: ).*; copy it again"
    refused(source, tmp_path / "out", message, error=ShardError)


def test_an_index_without_files(source: Path, tmp_path: Path):
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    refused(source, tmp_path / "out", "has no weight_map from tensors to files", error=ShardError)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_local_experts", "hidden_size"])
def test_numbers_of_the_config(source: Path, tmp_path: Path, key: str):
    for value in ("two", -1, 1.5, [2]):
        edit_config(source, **{key: value})
        refused(source, tmp_path / "out", rf"config\.json: {key} is .*, but must be a whole number")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", 192, r"hidden_size is 192, but model\.embed_tokens\.weight has shape \[\d+, \d+\]"),
        ("vocab_size", 10, r"vocab_size is 10, but model\.embed_tokens\.weight has shape"),
        ("num_experts_per_tok", 5, "num_experts_per_tok is 5, but a layer has 4 experts to choose from"),
        ("num_experts_per_tok", 0, "num_experts_per_tok is 0, but a layer has 4 experts to choose from"),
        ("moe_intermediate_size", 7, r"moe_intermediate_size is 7, but model\.layers\.0\.\S+\.w3 has \d+ rows"),
    ],
)
def test_a_config_of_another_model(source: Path, tmp_path: Path, key: str, value: int, message: str):
    edit_config(source, **{key: value})
    refused(source, tmp_path / "out", message)


def test_a_tensor_that_one_layer_alone_has(tmp_path: Path):
    source = make_model("mixtral", tmp_path / "source", num_hidden_layers=3)
    extra = "model.layers.1.self_attn.extra.weight"
    edit_tensors(source, WEIGHTS, lambda tensors: tensors.update({extra: torch.randn(64, 64)}))
    refused(source, tmp_path / "out", rf"^{re.escape(extra)}: no other layer has it; is it another model's\?")


def test_an_embedding_of_other_dimensions(source: Path, tmp_path: Path):
    name = "model.embed_tokens.weight"
    edit_tensors(source, WEIGHTS, lambda tensors: tensors.update({name: tensors[name][None].clone()}))
    refused(source, tmp_path / "out", rf"tensor {re.escape(name)} must have 2 dimensions, found \[1, ")


def test_a_file_that_goes_on_after_its_tensors(source: Path, tmp_path: Path):
    (source / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes() + b"more")
    refused(source, tmp_path / "out", r"model\.safetensors: too long: \d+ bytes, but its header", error=ShardError)


def test_metadata_that_is_no_object_of_texts(source: Path, tmp_path: Path):
    content = (source / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]) | {"__metadata__": [1]}).encode()
    (source / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    refused(source, tmp_path / "out", "its header is damaged: its metadata is no object of texts", error=ShardError)


def test_null_is_no_quantization(source: Path, tmp_path: Path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    convert(source, tmp_path / "out", Conversion(FAST), progress=False)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == "milo"
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": "gptq"}))
    refused(source, tmp_path / "other", r"the model is quantized already \(gptq\)")


@pytest.mark.parametrize(
    ("leaf", "method"), [("qweight", "GPTQ or AWQ"), ("qzeros", "GPTQ or AWQ"), ("weight_scale_inv", "FP8")]
)
def test_quantized_tensors_without_a_config(source: Path, tmp_path: Path, leaf: str, method: str):
    def edit(tensors):
        tensors[Q_PROJ.replace("weight", leaf)] = torch.zeros(8, 8, dtype=torch.int32)
        del tensors[Q_PROJ]

    edit_tensors(source, WEIGHTS, edit)
    refused(source, tmp_path / "out", rf"quantized already: it holds model\..*q_proj\.{leaf}, as {method} stores it")


def test_a_part_of_a_larger_model(source: Path, tmp_path: Path):
    def edit(tensors):
        for name in list(tensors):
            tensors[f"language_model.{name}"] = tensors.pop(name)

    edit_tensors(source, WEIGHTS, edit)
    message = r"no tensor named model\.layers\.0\.…, but e\.g\. language_model\.model\.layers\.0\..*save that part"
    refused(source, tmp_path / "out", message)


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint16, torch.bool, torch.float64, torch.float8_e4m3fn])
def test_other_tensors_of_any_dtype_are_copied(source: Path, tmp_path: Path, dtype: torch.dtype):
    name = "model.layers.0.self_attn.extra"
    values = torch.arange(9).to(dtype)
    for layer in "01":
        edit_tensors(source, WEIGHTS, lambda tensors, layer=layer: tensors.update({name.replace("0", layer): values}))
    out = convert(source, tmp_path / "out", Conversion(FAST), progress=False).out
    written = load_file(out / "model-00001-of-00001.safetensors")[name]
    assert written.dtype == dtype
    assert written.view(torch.uint8).tolist() == values.view(torch.uint8).tolist()
    inspect_checkpoint(out)


def test_a_dtype_that_torch_has_not(source: Path, tmp_path: Path):
    content = (source / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"]["dtype"] = "F6_E2M3"
    text = json.dumps(header).encode()
    (source / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    refused(source, tmp_path / "out", r"tensor model\.norm\.weight is F6_E2M3; tensors are copied that are one of BF16")


@pytest.mark.parametrize("text", [None, Text("random", torch.randint(0, 64, (4, 32)), LearnOptions(steps=1, batch=2))])
@pytest.mark.parametrize("name", [Q_PROJ, "model.layers.1.block_sparse_moe.experts.1.w2.weight"])
def test_a_weight_beyond_all_scales(source: Path, tmp_path: Path, name: str, text: Text | None):
    def edit(tensors):
        tensors[name][3, 70] = 1e30

    edit_tensors(source, WEIGHTS, edit)
    refused(source, tmp_path / "out", name.removesuffix(".weight").replace(".", r"\."), Conversion(FAST, text=text))
