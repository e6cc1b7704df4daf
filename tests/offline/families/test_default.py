"""`milo quantize` without options on a family that transformers cannot run: no text, and a warning."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from tiny_families import make_family

from vllm_milo.offline.calibration.choose import check_runs
from vllm_milo.offline.cli import main
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.families.table import FAMILIES
from vllm_milo.offline.source.reader import ModelReader
from vllm_milo.validation import validate_checkpoint


def test_without_a_class_there_is_no_text(bundled_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, out = make_family("deepseek", tmp_path / "source"), tmp_path / "out"
    for file in bundled_model.glob("tokenizer*"):
        shutil.copy(file, source)
    assert main(["quantize", str(source), "-o", str(out), "--max-rounds", "1"]) == 0
    said = capsys.readouterr().err
    assert "warning: no calibration: " in said
    assert "has no class for the model type 'deepseek', and code that a model brings along is not run" in said
    assert "Quantizing without one (--calibration none), " in said
    assert validate_checkpoint(out).recipe["calibration"] == "none"
    assert "matrices get groups of 64 weights: 128 does not divide their input size (192, 704)" in said


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.not_run])
def test_a_class_that_holds_it_otherwise(name: str, tmp_path: Path):
    said = f"cannot run {name} a layer at a time: {FAMILIES[name].not_run}"
    with pytest.raises(ConversionError, match=re.escape(said)):
        check_runs(ModelReader(make_family(name, tmp_path / "source")))


def test_a_family_that_is_not_learned(tmp_path: Path):
    """Transformers runs it, and so does `milo eval`; the calibration would leave biases of experts out of its sums."""
    with pytest.raises(ConversionError, match=f"through a model of gpt_oss: {FAMILIES['gpt_oss'].not_learned}"):
        check_runs(ModelReader(make_family("gpt_oss", tmp_path / "source")))
