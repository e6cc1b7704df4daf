"""Conversions of sources with fewer than 16 bits a weight: the files of their copies in bfloat16, to the byte."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_edits import edit_config, edit_tensors
from quantized_sources import KEPT, WAYS, WEIGHTS, Tensors, Written, content, split_shards, write_both
from refusals import FAST
from safetensors.torch import load_file
from tiny_families import make_family
from tiny_models import TEXT as VALID
from tiny_models import VOCABULARY, logprobs, make_model

from vllm_milo.offline.cli import main
from vllm_milo.offline.conversion import Conversion, Text
from vllm_milo.offline.convert import convert
from vllm_milo.offline.effort import Effort
from vllm_milo.offline.evaluation.model import load_model
from vllm_milo.offline.learn.layer import LearnOptions
from vllm_milo.offline.ranks.policies import parse_policies
from vllm_milo.offline.source import reader as reading
from vllm_milo.offline.source.reader import ModelReader
from vllm_milo.offline.spread.remote import Remote

WINDOWS = torch.randint(0, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(0))
ALONG = Conversion(FAST, budget_bits=4.5, text=Text("random", WINDOWS, LearnOptions(steps=2, batch=2)))
PLAIN = Conversion(FAST, parse_policies("dense=16,kurtosis=8"))
FEW = ["--calibration-windows", "4", "--learn-steps", "2", "--max-rounds", "1", "--quiet", "--device", "cpu"]
MIXED = KEPT + r"|layers\.0\.self_attn\.o_proj|experts\.1\."
"""Keeps one expert and one projection in bfloat16 too, so that some are solved together with what is not."""


def predict_more(folder: Path) -> Path:
    """Give a model of two layers a third, which predicts further tokens."""

    def add(tensors: Tensors) -> None:
        second = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.1.")}
        tensors.update({name.replace("layers.1", "layers.2"): tensor.clone() for name, tensor in second.items()})
        tensors["model.layers.2.eh_proj.weight"] = torch.randn(128, 256).bfloat16()

    edit_tensors(folder, WEIGHTS, add)
    edit_config(folder, num_nextn_predict_layers=1)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Tiny models of the families that are published like this."""
    root = tmp_path_factory.mktemp("models")
    deepseek = predict_more(make_family("deepseek_v3", root / "deepseek_v3"))
    return {"deepseek_v3": deepseek, "qwen3_moe": make_model("qwen3_moe", root / "qwen3_moe", num_experts=4)}


@pytest.fixture(scope="module")
def bundled(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The bundled model in FP8 with the scales in a file of their own, and its copy."""
    found = write_both(small_model, tmp_path_factory.mktemp("bundled"), WAYS["fp8 blocks"])
    split_shards(found.source, lambda name: int(name.endswith("weight_scale_inv")))
    return found


def same(found: Written, out: Path, source_format: str, conversion: Conversion) -> None:
    """Assert that a model and its copy become the same checkpoint."""
    made = [convert(folder, out / folder.parent.name, conversion, progress=False).out for folder in found]
    assert content(made[0], source_format) == content(made[1])


FAMILIES = ("deepseek_v3", "qwen3_moe")
ALONG_A_TEXT = ("fp8 blocks", "packed int4 groups of 32", "mxfp4")
"""Ways that go along a text too, which sees no more of them than their values."""


@pytest.mark.parametrize(
    ("way", "family", "conversion"),
    [
        *(pytest.param(way, family, PLAIN, id=f"{way}-{family}") for way in WAYS for family in FAMILIES),
        *(pytest.param(way, family, ALONG, id=f"{way}-{family}-text") for way in ALONG_A_TEXT for family in FAMILIES),
    ],
)
def test_a_model_and_its_copy(
    models: Mapping[str, Path], tmp_path: Path, way: str, family: str, conversion: Conversion
):
    found = write_both(models[family], tmp_path, WAYS[way])
    source_format = ModelReader(found.source).source.view.format
    assert source_format is not None
    conversion = replace(conversion, ignore=[r"re:.*layers\.1\.self_attn\.o_proj"])
    same(found, tmp_path / "out", source_format, conversion)
    (shard,) = (tmp_path / "out" / "stored").glob("*.safetensors")
    ahead = "model.layers.2.mlp.experts.1.up_proj.weight"
    for name in ["model.layers.1.self_attn.o_proj.weight", *([ahead] if family == "deepseek_v3" else [])]:
        assert torch.equal(load_file(shard)[name], load_file(found.copy / WEIGHTS)[name])


@pytest.mark.parametrize("way", ["fp8 blocks", "packed int4 groups with zero points"])
def test_some_matrices_in_16_bits(models: Mapping[str, Path], tmp_path: Path, way: str, monkeypatch):
    """On one device and on several, whose processes read and make values of their own."""
    found = write_both(models["deepseek_v3"], tmp_path, WAYS[way], MIXED)
    edit_config(found.source, quantization_config=WAYS[way].config | {"modules_to_not_convert": ["o_proj"]})
    source_format = ModelReader(found.source).source.view.format
    elsewhere, real = [], Remote.receive
    monkeypatch.setattr(Remote, "receive", lambda self: elsewhere.append(self) or real(self))
    same(found, tmp_path / "out", str(source_format), PLAIN)
    assert not elsewhere
    spread = convert(found.source, tmp_path / "spread", replace(PLAIN, more_devices=("cpu", "cpu")), progress=False).out
    assert len(set(elsewhere)) == 2
    assert content(spread, source_format) == content(tmp_path / "out" / "copy")


def quantize(found: Written, out: Path, *options: str) -> list[Path]:
    """Convert a model and its copy by the command."""
    made = []
    for folder in found:
        made.append(out / folder.parent.name)
        assert main(["quantize", str(folder), "-o", str(made[-1]), *FEW, *options]) == 0
    return made


@pytest.mark.parametrize("options", [[], ["--calibration", "self"], ["--preset", "best"]])
def test_by_default_and_as_a_whole(bundled: Written, tmp_path: Path, monkeypatch, options: list[str]):
    monkeypatch.setattr("vllm_milo.offline.calibration.choose.WINDOW", 64)
    monkeypatch.setattr("vllm_milo.offline.effort.CPU_EFFORT", Effort(6, 3, 4))  # of the whole model too
    stored, copy = quantize(bundled, tmp_path, *options)
    assert content(stored, "FP8 e4m3, a scale for 128x128 weights") == content(copy)


def test_the_plan(bundled: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """From headers alone, the same sizes, memory and splits."""
    plans = []
    for folder in bundled:
        assert main(["quantize", str(folder), "-o", str(tmp_path / "out"), "--dry-run", "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["source_format"] == plan["format"].pop("recipe").get("source_format")
        plans.append(plan)
    different = {key for key in plans[0] if plans[0][key] != plans[1][key]}
    assert different <= {"model", "source_format", "disk_bytes", "disk_peak_bytes", "disk_free", "memory_free"}
    assert 0 < plans[0]["disk_bytes"] - plans[1]["disk_bytes"] < 100  # what config.json says of the source
    assert plans[0]["source_format"] == "FP8 e4m3, a scale for 128x128 weights"
    assert main(["quantize", str(bundled.source), "-o", str(tmp_path / "out"), "--dry-run"]) == 0
    line = "stored as        FP8 e4m3, a scale for 128x128 weights; becomes bfloat16 as it is read"
    assert line in capsys.readouterr().out.splitlines()


def test_verify_and_eval_against_such_a_reference(bundled: Written, tmp_path: Path, capsys):
    out = tmp_path / "out"
    options = ["--preset", "fast", "--max-rounds", "1", "--ignore", r"re:.*layers\.1\.self_attn.*", "--quiet"]
    assert main(["quantize", str(bundled.source), "-o", str(out), *options]) == 0
    said = []
    for folder in bundled:
        capsys.readouterr()
        assert main(["verify", str(out), "--reference", str(folder), "--quiet", "--json"]) == 0
        verdict = json.loads(capsys.readouterr().out)
        text = ["--text", str(VALID), "--max-windows", "2", "--window", "64", "--quiet", "--json"]
        assert main(["eval", str(out), "--reference", str(folder), *text]) == 0
        said.append((verdict, json.loads(capsys.readouterr().out)))
    assert json.dumps(said[0]).replace(str(bundled.source), "") == json.dumps(said[1]).replace(str(bundled.copy), "")
    assert main(["inspect", str(out), "--json"]) == 0
    recipe = json.loads(capsys.readouterr().out)["recipe"]
    assert recipe["source_format"] == "FP8 e4m3, a scale for 128x128 weights"


def test_the_whole_model_as_transformers_runs_it(bundled: Written):
    stored, copy = (load_model(folder) for folder in bundled)
    ids = torch.arange(40).tolist()
    assert torch.equal(logprobs(stored, ids), logprobs(copy, ids))


def test_going_on(models: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """After an error in the second layer; not where a file has changed that holds scales alone."""
    found = write_both(models["qwen3_moe"], tmp_path, WAYS["float channel"])
    scales = found.source / split_shards(found.source, lambda name: int(name.endswith("weight_scale")))[1]
    out, real = tmp_path / "out" / "stored", reading.read_part
    monkeypatch.setattr("vllm_milo.offline.spread.job.read_part", lambda part: _failing(real, part))
    with pytest.raises(OSError, match="gone"):
        convert(found.source, out, replace(PLAIN, policies=parse_policies("dense=8")), progress=False)
    monkeypatch.undo()
    again = replace(PLAIN, policies=parse_policies("dense=8"), resume=True)
    before = scales.stat()
    os.utime(scales, (0, 0))
    with pytest.raises(ValueError, match=rf"are of another conversion: .*{scales.name}: changed"):
        convert(found.source, out, again, progress=False)
    os.utime(scales, ns=(before.st_atime_ns, before.st_mtime_ns))
    made = convert(found.source, out, again, progress=False).out
    whole = convert(found.copy, tmp_path / "out" / "copy", replace(again, resume=False), progress=False).out
    assert content(made, "FP8 e4m3 (compressed-tensors), a scale for a row") == content(whole)


def _failing(real: Callable[[Any], Any], part: Any) -> Any:
    if "layers.1" in part.tensor:
        raise OSError("gone")
    return real(part)


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_values_are_the_same_on_a_gpu(models: Mapping[str, Path], tmp_path: Path, way: str):
    reader = ModelReader(write_both(models["deepseek_v3"], tmp_path, WAYS[way]).source)
    for name in reader.source.view.encodings:
        values = reader.load(name, torch.device("cuda"))
        assert values.is_cuda
        assert torch.equal(values.cpu(), reader.load(name))
