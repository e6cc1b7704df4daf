"""Checkpoints whose output head is stored in 8 or 4 bits, from the command line to transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from folder_edits import edit_format, edit_tensors
from tiny_models import make_model
from transformers import AutoModelForCausalLM

from vllm_milo.checkpoint import CheckpointError, MiLoFormat
from vllm_milo.offline.checkpoint.inspect import format_report, inspect_checkpoint
from vllm_milo.offline.cli import main as milo
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.evaluation.model import load_model
from vllm_milo.offline.evaluation.verify import format_verdict, verify_checkpoint
from vllm_milo.offline.exporting.exporter import export_checkpoint
from vllm_milo.offline.nouns import Recipe
from vllm_milo.shards import read_tensors
from vllm_milo.validation import validate_checkpoint

SHARD = "model-00001-of-00001.safetensors"
VOCABULARY = 330
"""No multiple of anything that vLLM pads to."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3_moe", tmp_path_factory.mktemp("source"), vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def stored(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Checkpoints by the bits of their heads."""
    root = tmp_path_factory.mktemp("stored")
    recipe = Recipe(method="rtn", group_size=64)
    return {
        bits: convert(source, root / str(bits), Conversion(recipe, lm_head_bits=bits), progress=False).out
        for bits in (16, 8, 4)
    }


@pytest.mark.parametrize(("bits", "columns", "groups"), [(8, 32, 1), (4, 16, 4)])
def test_nothing_else_changes(bits: int, columns: int, groups: int, stored: dict[int, Path]):
    plain, found = read_tensors(stored[16]), read_tensors(stored[bits])
    assert plain.keys() - found.keys() == {"lm_head.weight"}
    assert found.keys() - plain.keys() == {"lm_head.head_words", "lm_head.head_scale"}
    assert found["lm_head.head_words"][1:3] == ("I32", (VOCABULARY, columns))
    assert found["lm_head.head_scale"][1:3] == ("F16", (VOCABULARY, groups))
    stated = json.loads((stored[bits] / "config.json").read_text())["quantization_config"]
    assert stated["lm_head_bits"] == stated["recipe"]["lm_head_bits"] == bits
    assert stated["ignore"][0] == "lm_head"  # it is no matrix of MiLo's


def test_without_the_option_no_key_is_written(stored: dict[int, Path]):
    assert "lm_head_bits" not in (stored[16] / "config.json").read_text()
    assert "lm_head_bits" not in MiLoFormat().to_dict()


@pytest.mark.parametrize(("bits", "largest"), [(8, 0.01), (4, 0.09)])
def test_inspect_and_verify_count_it_apart(bits: int, largest: float, source: Path, stored: dict[int, Path]):
    plain, found = inspect_checkpoint(stored[16]), inspect_checkpoint(stored[bits])
    assert found["bits_per_weight"] == plain["bits_per_weight"]
    weights = VOCABULARY * 128
    size = weights * bits // 8 + VOCABULARY * (2 if bits == 8 else 8)
    assert found["lm_head"] == {"bits": bits, "weights": weights, "bytes": size}
    assert plain["lm_head"] == {"bits": 16, "weights": weights, "bytes": 2 * weights}
    assert plain["bytes"] - found["bytes"] == 2 * weights - size
    assert f"weights in {bits} bits" in format_report(found)
    assert f"lm_head in {bits} bits" in (stored[bits] / "README.md").read_text()
    verdict = verify_checkpoint(stored[bits], source)
    assert verdict.good, verdict.problems
    error = verdict.to_dict()["reference"]["lm_head_error"]
    assert 0 < error < largest
    assert "lm_head          relative error" in format_verdict(verdict)
    assert "lm_head_error" not in verify_checkpoint(stored[16], source).to_dict()["reference"]


def test_verify_finds_another_head(source: Path, stored: dict[int, Path], tmp_path: Path):
    broken = Path(shutil.copytree(stored[8], tmp_path / "broken"))
    (broken / "milo_manifest.json").unlink()
    edit_tensors(broken, SHARD, lambda tensors: tensors["lm_head.head_scale"].neg_())
    (problem,) = verify_checkpoint(broken, source).problems
    assert problem == "lm_head: relative error 2; no good checkpoint reaches 1"


@pytest.mark.parametrize("bits", [8, 4])
def test_transformers_has_the_dequantized_head(bits: int, stored: dict[int, Path]):
    model = AutoModelForCausalLM.from_pretrained(stored[bits], dtype=torch.float32)
    wanted = load_model(stored[bits], torch.float32)
    assert torch.equal(model.lm_head.weight, wanted.lm_head.weight)
    plain = load_model(stored[16], torch.float32).lm_head.weight
    assert 0 < (model.lm_head.weight - plain).norm() / plain.norm() < (0.01 if bits == 8 else 0.09)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, wanted(ids).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lm_head_bits": None}, r"lm_head_bits is None; supported are"),
        ({"lm_head_bits": 6}, r"lm_head_bits is 6; supported are \(16, 8, 4\)"),
        ({"lm_head_bits": True}, r"lm_head_bits is True"),
        ({"lm_head_bits": 16}, r"lm_head\.head_scale: extra, lm_head_bits does not say"),
        ({"lm_head_bits": 4}, r"lm_head\.head_scale: expected F16 \[330, 8\] \(lm_head_bits 4\), found F16 \[330, 1\]"),
    ],
)
def test_bits_that_the_files_do_not_have(change: dict, message: str, stored: dict[int, Path], tmp_path: Path):
    broken = Path(shutil.copytree(stored[8], tmp_path / "broken"))
    edit_format(broken, **change)
    with pytest.raises(CheckpointError, match=message):
        validate_checkpoint(broken)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop("lm_head.head_scale"), r"lm_head\.head_scale: missing"),
        (lambda tensors: tensors.update({"lm_head.weight": torch.zeros(330, 128)}), r"lm_head\.weight: extra"),
        (
            lambda tensors: [tensors.pop(f"lm_head.{leaf}") for leaf in ("head_scale", "head_words")],
            r"asks for one head with head_words and head_scale; found none",
        ),
    ],
)
def test_a_head_that_is_not_whole(edit, message: str, stored: dict[int, Path], tmp_path: Path):
    broken = Path(shutil.copytree(stored[8], tmp_path / "broken"))
    edit_tensors(broken, SHARD, edit)
    with pytest.raises(CheckpointError, match=message):
        validate_checkpoint(broken)


def test_a_tied_head_is_refused_before_any_work(bundled_model: Path, tmp_path: Path):
    with pytest.raises(ConversionError, match=r"--lm-head-bits 8: config\.json ties the output head to the embeddings"):
        convert(bundled_model, tmp_path / "out", Conversion(lm_head_bits=8), progress=False)
    assert not (tmp_path / "out").exists()


def test_dry_run_says_what_it_takes(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    asked = ["quantize", str(source), "-o", str(tmp_path / "out"), "--preset", "fast", "--dry-run", "--json"]
    said = []
    for bits in ("4", "16"):
        milo([*asked, "--lm-head-bits", bits])
        said.append(json.loads(capsys.readouterr().out))
    assert said[0]["lm_head"] == {"bits": 4, "weights": 330 * 128, "bytes": 330 * 72}
    assert said[1]["lm_head"] is None
    assert said[0]["bits_per_weight"] == said[1]["bits_per_weight"]
    assert said[1]["bytes"] - said[0]["bytes"] == 330 * (256 - 72)


def test_export_refuses_it(stored: dict[int, Path], source: Path, tmp_path: Path):
    recipe = Recipe(method="rtn", group_size=64, integer_zeros=True)
    made = convert(source, tmp_path / "made", Conversion(recipe, lm_head_bits=8), progress=False).out
    with pytest.raises(ConversionError, match="stores lm_head in 8 bits"):
        export_checkpoint(made, tmp_path / "exported")


def test_resume_goes_on_with_the_same_bits_alone(source: Path, stored: dict[int, Path], tmp_path: Path, monkeypatch):
    from vllm_milo.offline.checkpoint.writer import CheckpointWriter

    recipe, out = Recipe(method="rtn", group_size=64), tmp_path / "out"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "seal", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, Conversion(recipe, lm_head_bits=8), progress=False)
    with pytest.raises(ConversionError, match="recipe: lm_head_bits was 8 and is 4"):
        convert(source, out, Conversion(recipe, lm_head_bits=4, resume=True), progress=False)
    convert(source, out, Conversion(recipe, lm_head_bits=8, resume=True), progress=False)
    assert (out / SHARD).read_bytes() == (stored[8] / SHARD).read_bytes()
