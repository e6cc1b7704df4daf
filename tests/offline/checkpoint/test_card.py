"""The model card of a checkpoint: what it states, what it takes from the source's, and what `milo eval` adds."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from refusals import FAST
from tiny_models import TEXT

from vllm_milo.offline.checkpoint.card import CardNotes
from vllm_milo.offline.checkpoint.inspect import inspect_checkpoint
from vllm_milo.offline.cli import main
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.evaluation.verify import verify_checkpoint
from vllm_milo.offline.hub_names import hub_origin


def card_of(folder: Path) -> ModelCard:
    return ModelCard((folder / "README.md").read_text(encoding="utf-8"))


def test_it_states_what_the_checkpoint_is(checkpoint: Path, sources: dict[str, Path]):
    card = card_of(checkpoint)
    bits = inspect_checkpoint(checkpoint)["bits_per_weight"]
    assert f"| {bits:.3f}: codes" in card.text
    assert "vllm serve OUT --quantization milo" in card.text
    assert "called from Python" in card.text
    assert {"milo", "3-bit", "moe", "vllm"} <= set(card.data.tags)
    assert str(checkpoint.parent) not in card.content
    assert str(sources["qwen2_moe"].parent) not in card.content


def test_the_licence_comes_along(source: Path, tmp_path: Path):
    metadata = "license: other\nlicense_name: own\nlanguage: [en, de]\nbase_model: org/base\ndatasets: [x]\n"
    (source / "README.md").write_text(f"---\n{metadata}---\n# Source\n")
    data = card_of(convert(source, tmp_path / "out", Conversion(FAST), progress=False).out).data.to_dict()
    assert data["license"] == "other"
    assert data["license_name"] == "own"
    assert data["language"] == ["en", "de"]
    assert data["base_model"] == "org/base"
    assert data["base_model_relation"] == "quantized"
    assert "datasets" not in data


@pytest.mark.parametrize(
    "text", ["---\nlicense: [\n---\n", "---\nlicense: {a: 1}\n---\n", "# no metadata", "---\n---\n"]
)
def test_a_source_card_that_says_nothing(source: Path, tmp_path: Path, text: str):
    (source / "README.md").write_text(text)
    out = convert(source, tmp_path / "out", Conversion(FAST), progress=False).out
    assert "license" not in card_of(out).data.to_dict()
    assert (out / "README_SOURCE.md").read_text() == text


def test_the_command_is_told_without_folders_and_what_does_not_decide(bundled_model: Path, tmp_path: Path):
    text = tmp_path / "secret" / "text.txt"
    text.parent.mkdir()
    text.write_text("x")
    words = [str(bundled_model), "-o", str(tmp_path / "out"), "--method", "hqq", "--max-rounds=2", "--quiet"]
    assert main(["quantize", *words]) == 0
    assert "\nmilo quantize tiny-qwen2-moe -o OUT --method hqq --max-rounds=2\n" in card_of(tmp_path / "out").text


def test_folders_of_the_hubs_cache(tmp_path: Path):
    assert hub_origin(tmp_path / "models--org--a--b" / "snapshots" / "12") == ("org/a--b", "12")
    assert hub_origin(tmp_path) is None


def test_what_is_measured_is_written_into_it(bundled_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    conversion = Conversion(FAST, card=CardNotes("milo quantize x"))
    out = convert(bundled_model, tmp_path / "out", conversion, progress=False).out
    text = (out / "README.md").read_text()
    (out / "README.md").write_text(text + "\n## Of mine\n")
    words = ["eval", str(out), "--text", str(TEXT), "--max-windows", "1", "--quiet", "--update-card"]
    for _ in range(2):
        assert main([*words, "--reference", str(bundled_model)]) == 0
    card = card_of(out)
    assert card.text.count("## Measured") == 1
    assert "## Of mine" in card.text
    assert "milo quantize x" in card.text
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results.keys() == {"perplexity", "kl_divergence", "top1_agreement"}
    assert (
        f"| {results['kl_divergence']:.4f} | {results['top1_agreement']:.4f} | {results['perplexity']:.4f} |"
        in card.text
    )
    verdict = verify_checkpoint(out)
    assert verdict.good
    assert verdict.notes == []
    (out / "README.md").unlink()
    assert main([*words, "--reference", str(bundled_model)]) == 0
    assert "## Measured" in card_of(out).text
    (out / "README.md").write_text("---\na: [\n---\n")
    capsys.readouterr()
    assert main([*words, "--reference", str(bundled_model)]) == 1
    assert "its metadata cannot be read" in capsys.readouterr().err


def test_cards_that_are_not_ours(bundled_model: Path, checkpoint: Path, tmp_path: Path, capsys):
    words = ["--text", str(TEXT), "--quiet", "--update-card"]
    assert main(["eval", str(checkpoint), *words]) == 1
    assert "--update-card needs --reference" in capsys.readouterr().err
    assert main(["eval", str(bundled_model), *words, "--reference", str(bundled_model)]) == 1
    assert "is no MiLo checkpoint" in capsys.readouterr().err
    cached = shutil.copytree(checkpoint, tmp_path / "models--a--b" / "snapshots" / "1")
    assert main(["eval", str(cached), *words, "--reference", str(bundled_model)]) == 1
    assert "lies in the Hub's cache" in capsys.readouterr().err


def test_a_disk_that_is_full_at_the_card(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It is written last, when all hours are spent: they must not be lost."""

    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("vllm_milo.offline.checkpoint.card.flush", full)
        with pytest.raises(ConversionError, match=r"(?s)README.md: cannot be written: No space left.*--resume"):
            convert(source, tmp_path / "out", Conversion(FAST), progress=False)
    out = convert(source, tmp_path / "out", Conversion(FAST, resume=True), progress=False).out
    assert verify_checkpoint(out).good
    assert (out / "README.md").exists()
