"""Presets and budgets end to end on the bundled model."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import TEXT

from vllm_milo.offline.checkpoint.inspect import inspect_checkpoint
from vllm_milo.offline.cli import main
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.presets import PRESETS
from vllm_milo.offline.ranks.policies import Policy, parse_policies

FEW = ("--max-rounds", "2", "--quiet")


def quantize(model: Path, out: Path, *options: str) -> dict:
    assert main(["quantize", str(model), "-o", str(out), *FEW, *options]) == 0
    return inspect_checkpoint(out)


def test_paper_presets_are_fractions_of_the_hidden_size():
    assert PRESETS["paper-s1"].policies({"hidden_size": 4096}) == parse_policies("dense=512,kurtosis=16")
    assert PRESETS["paper-s2"].policies({"hidden_size": 4096}) == parse_policies("dense=1024,kurtosis=32")
    assert PRESETS["paper-s1"].policies({"hidden_size": 128}) == [Policy("dense", 16), Policy("kurtosis", 1)]
    with pytest.raises(ConversionError, match="no hidden_size"):
        PRESETS["paper-s1"].policies({})


def test_without_options_it_is_balanced(bundled_model: Path, tmp_path: Path):
    report = quantize(bundled_model, tmp_path / "out")
    assert report["recipe"]["method"] == "milo"
    assert report["group_size"] == 128
    assert 3.5 < report["bits_per_weight"] <= 3.6
    # matrices that every token passes get more than routed experts
    assert report["ranks"]["attention"]["mean"] > 4 * report["ranks"]["routed_expert"]["mean"]


@pytest.mark.parametrize(
    ("options", "bits", "method"),
    [
        (["--preset", "small"], 3.4, "milo"),
        (["--preset", "paper-s1", "--budget-bits", "3.7"], 3.7, "paper"),
        (["--preset", "balanced", "--budget-bits", "3.5", "--group-size", "64"], 3.5, "milo"),
        (["--ranks", "dense=8,sparse=4", "--budget-bits", "3.9"], 3.9, "milo"),
    ],
)
def test_budgets_are_kept(
    sources: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    bits: float,
    method: str,
):
    report = quantize(sources["qwen3_moe"], tmp_path / "out", *options)
    assert bits - 0.12 < report["bits_per_weight"] <= bits
    assert report["recipe"]["method"] == method
    warned = f"--budget-bits {bits:g} leaves nothing for compensators" in capsys.readouterr().err
    assert warned == ("--group-size" in options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "best", "--calibration-windows", "0"], "must be at least 1"),
        (["--preset", "small", "--method", "paper"], "--preset small and --method exclude each other"),
        (["--method", "hqq", "--budget-bits", "3.6"], "--budget-bits needs compensators"),
        (["--method", "paper", "--calibration", str(TEXT)], "--method paper cannot use --calibration"),
        (["--budget-bits", "3.1"], "group size 128 take 3.25 bits a weight already"),
        (["--method", "paper", "--budget-bits", "3.51"], "these policies store 3.575 bits a weight at their least"),
        (["--preset", "best", "--calibration", "/nowhere.txt"], "/nowhere.txt: cannot be read as UTF-8 text"),
        (["--preset", "best", "--calibration", str(TEXT), "--calibration-windows", "0"], "must be at least 1"),
    ],
)
def test_errors(bundled_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options, message):
    assert main(["quantize", str(bundled_model), "-o", str(tmp_path / "out"), *FEW, *options]) == 1
    assert message in capsys.readouterr().err
