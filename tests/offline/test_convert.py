"""The converter end to end on tiny models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from refusals import FAST, WEIGHTS
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES
from transformers import AutoModelForCausalLM

from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.evaluation.model import load_model
from vllm_milo.offline.nouns import Recipe
from vllm_milo.offline.ranks.policies import parse_policies
from vllm_milo.offline.source.reader import ModelReader
from vllm_milo.shards import read_tensors
from vllm_milo.validation import quantized_modules, validate_checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, sources: dict[str, Path], tmp_path: Path):
    conversion = Conversion(FAST, parse_policies("uniform=8"))
    summary = convert(sources[family], tmp_path / "out", conversion, progress=False)
    fmt = validate_checkpoint(summary.out)
    modules = quantized_modules(read_tensors(summary.out))
    assert summary.matrices == len(modules)
    names = {name.rpartition(".")[2] for name in modules}
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= names
    assert not any(name.endswith((".gate", "shared_expert_gate", "lm_head")) for name in modules)
    kept = load_file(sources[family] / WEIGHTS)
    written = load_file(summary.out / "model-00001-of-00001.safetensors")
    for name, tensor in kept.items():
        if name.rpartition(".")[0] not in modules:
            assert torch.equal(tensor, written[name]), name
            assert tensor.dim() < 2 or "embed_tokens" in name or fmt.ignores(name.rpartition(".")[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_experts_give_the_same_checkpoint(family: str, sources: dict[str, Path], tmp_path: Path):
    fused = tmp_path / "fused"
    shutil.copytree(sources[family], fused)
    model = AutoModelForCausalLM.from_pretrained(sources[family], dtype=torch.bfloat16)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    assert any(tensor.dim() == 3 for tensor in state.values())
    save_file(state, fused / WEIGHTS, metadata={"format": "pt"})
    conversion = Conversion(FAST, parse_policies("uniform=8"))
    folders = [
        convert(folder, tmp_path / f"out-{index}", conversion, progress=False).out
        for index, folder in enumerate((sources[family], fused))
    ]
    classic, split = (load_file(folder / "model-00001-of-00001.safetensors") for folder in folders)
    assert classic.keys() == split.keys()
    assert all(torch.equal(classic[name], split[name]) for name in classic)


def test_dequantized_model_is_close_to_the_source(sources: dict[str, Path], tmp_path: Path):
    conversion = Conversion(Recipe(max_rounds=2, factor_bits=8), parse_policies("uniform=64"))
    out = convert(sources["olmoe"], tmp_path / "out", conversion, progress=False).out
    quantized, original = load_model(out), load_model(sources["olmoe"])
    report = json.loads((out / "milo_report.json").read_text())["matrices"]
    name = "model.layers.1.self_attn.o_proj"
    found, expected = (model.get_parameter(f"{name}.weight").detach() for model in (quantized, original))
    assert float((found - expected).norm() / expected.norm()) == pytest.approx(report[name]["error"], rel=1e-3)


def test_shards_are_indexed_and_streamed(sources: dict[str, Path], tmp_path: Path):
    conversion = Conversion(FAST, shard_bytes=60_000)
    out = convert(sources["qwen3_moe"], tmp_path / "out", conversion, progress=False).out
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 3
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for file in files for tensor in load_file(out / file).values()
    )


def test_streaming_loads_one_layer_at_a_time(sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    order = []
    load = ModelReader.load
    monkeypatch.setattr(ModelReader, "load", lambda self, tensor: order.append(tensor) or load(self, tensor))
    convert(sources["olmoe"], tmp_path / "out", Conversion(FAST), progress=False)
    layers = [name.split(".")[2] for name in order if name.startswith("model.layers.")]
    assert layers == sorted(layers)
    assert len(order) == len(set(order))


def test_tokenizer_and_other_files_come_along(bundled_model: Path, tmp_path: Path):
    out = convert(bundled_model, tmp_path / "out", Conversion(FAST), progress=False).out
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (bundled_model / name).read_bytes()


def test_seed_makes_it_reproducible(sources: dict[str, Path], tmp_path: Path):
    conversion = Conversion(FAST, parse_policies("uniform=16"))
    folders = [convert(sources["olmoe"], tmp_path / name, conversion, progress=False).out for name in "ab"]
    contents = [(folder / "model-00001-of-00001.safetensors").read_bytes() for folder in folders]
    assert contents[0] == contents[1]


def test_ignored_layers_stay(sources: dict[str, Path], tmp_path: Path):
    conversion = Conversion(FAST, parse_policies("dense=8"), ignore=["re:.*layers\\.0\\.self_attn.*"])
    out = convert(sources["mixtral"], tmp_path / "out", conversion, progress=False).out
    modules = quantized_modules(read_tensors(out))
    assert "model.layers.0.self_attn.q_proj" not in modules
    assert "model.layers.1.self_attn.q_proj" in modules
