"""Presets and budgets end to end on a part of the bundled model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_models import TEXT

from vllm_milo.offline.checkpoint.inspect import inspect_checkpoint
from vllm_milo.offline.cli import main
from vllm_milo.offline.effort import Effort
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.nouns import Recipe
from vllm_milo.offline.presets import PRESETS
from vllm_milo.offline.ranks.policies import Policy, parse_policies

FEW = ("--max-rounds", "1")
LITTLE = ("--calibration-windows", "2", "--learn-steps", "2")
NONE = ("--calibration", "none")


def quantize(model: Path, out: Path, *options: str) -> dict:
    assert main(["quantize", str(model), "-o", str(out), *FEW, *options]) == 0
    return inspect_checkpoint(out)


def test_paper_presets_are_fractions_of_the_hidden_size():
    assert PRESETS["paper-s1"].policies({"hidden_size": 4096}) == parse_policies("dense=512,kurtosis=16")
    assert PRESETS["paper-s2"].policies({"hidden_size": 4096}) == parse_policies("dense=1024,kurtosis=32")
    assert PRESETS["paper-s1"].policies({"hidden_size": 128}) == [Policy("dense", 16), Policy("kurtosis", 1)]
    with pytest.raises(ConversionError, match="no hidden_size"):
        PRESETS["paper-s1"].policies({})


def test_without_options_it_is_balanced(small_model: Path, tmp_path: Path):
    report = quantize(small_model, tmp_path / "out", *LITTLE)
    recipe = report["recipe"]
    assert (recipe["method"], recipe["base"], recipe["budget_bits"]) == ("milo", "least squares", 3.6)
    assert (recipe["calibration"], recipe["calibration_tokens"], recipe["learn_steps"]) == ("text", 2 * 512, 2)
    assert report["group_size"] == 64
    assert 3.59 < report["bits_per_weight"] <= 3.6
    # matrices that every token passes get more than routed experts
    assert report["ranks"]["attention"]["mean"] > 4 * report["ranks"]["routed_expert"]["mean"]


@pytest.mark.parametrize(
    ("preset", "learned", "budget", "expected"),
    [
        ("balanced", True, None, 64),
        ("best", True, None, 64),
        ("balanced", False, None, 128),  # ranks are worth more where nothing is learned
        ("balanced", True, 3.5, 128),  # which scales of groups of 64 alone would take
        ("balanced", True, 3.55, 64),
        ("small", True, None, 128),
        ("fast", False, None, 128),
        ("paper-s1", True, None, 64),
    ],
)
def test_groups(preset: str, learned: bool, budget: float | None, expected: int):
    assert PRESETS[preset].groups(learned, budget) == expected


@pytest.mark.parametrize(
    ("options", "broken", "expected"),
    [([], False, 64), (["--learn-steps", "0"], False, 128), (["--budget-bits", "3.4"], False, 128), ([], True, 128)],
)
def test_groups_are_larger_where_nothing_is_learned(
    options: list[str],
    broken: bool,
    expected: int,
    small_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """By choice, or since the model has no tokenizer for the default's text."""
    source = tmp_path / "source"
    shutil.copytree(small_model, source)
    if broken:
        for file in source.glob("*token*"):
            file.unlink()
    assert main(["quantize", str(source), "-o", str(tmp_path / "out"), "--dry-run", "--json", *options]) == 0
    found = json.loads(capsys.readouterr().out)["by_kind"]["attention"]["group_sizes"]
    assert list(found) == [str(expected)]


def test_best_trains_the_whole_model(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vllm_milo.offline.effort.CPU_EFFORT", Effort(windows=1, steps=3, batch=1))
    report = quantize(small_model, tmp_path / "out", "--preset", "best")
    assert report["recipe"]["calibration_tokens"] == 2 * 512
    assert (report["recipe"]["learn_steps"], report["recipe"]["tune_steps"]) == (3, 6)
    tuning = json.loads((tmp_path / "out" / "milo_report.json").read_text(encoding="utf-8"))["tuning"]
    assert 0 < tuning["last_kl"] < 2 * tuning["first_kl"]


def test_best_uses_more_of_the_text(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr("vllm_milo.offline.cli.quantize.carry_out", lambda plan, *_: seen.append(plan.conversion))
    monkeypatch.setattr("vllm_milo.offline.cli.quantize.print_summary", lambda summary: None)
    for name in ("balanced", "best", "small", "fast"):
        assert main(["quantize", str(small_model), "-o", str(tmp_path / "out"), "--preset", name]) == 0
    balanced, best, small, fast = (conversion.text for conversion in seen)
    assert fast is None
    assert [len(text.windows) for text in (balanced, small)] == [32, 32]
    assert len(best.windows) == 64
    assert [text.tune is None for text in (balanced, best, small)] == [True, False, True]


def test_best_without_memory_for_the_whole_model_says_so(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("vllm_milo.offline.calibration.memory.tuning_need", lambda *_: 2**60)
    report = quantize(small_model, tmp_path / "out", "--preset", "best", *LITTLE)
    assert "tune_steps" not in report["recipe"]
    assert "its layers are trained one by one only" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--preset", "fast"], ["--preset", "balanced", *NONE]])
def test_without_a_calibration_the_base_is_hqq(small_model: Path, tmp_path: Path, options: list[str]):
    report = quantize(small_model, tmp_path / "out", *options)
    recipe = report["recipe"]
    assert (recipe["method"], recipe["base"], recipe["calibration"]) == ("milo", "hqq", "none")
    assert "calibration_tokens" not in recipe
    assert 3.57 < report["bits_per_weight"] <= 3.6  # steps of 16 are coarse in so small a model


def test_a_model_that_cannot_be_calibrated_gets_a_warning(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The tiny models have no tokenizer that could read it: no reason to fail, unless a text was asked for."""
    report = quantize(sources["qwen3_moe"], tmp_path / "out", "--preset", "small", "--budget-bits", "3.4")
    assert (report["recipe"]["base"], report["recipe"]["calibration"]) == ("hqq", "none")
    assert "warning: no calibration: " in (said := capsys.readouterr().err)
    assert "Quantizing without one (--calibration none), which" in said
    asked = ["quantize", str(sources["qwen3_moe"]), "-o", str(tmp_path / "asked"), *FEW, "--calibration", "text"]
    assert main(asked) == 1
    assert capsys.readouterr().err.startswith("milo quantize: error: ")
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize(
    "options", [["--preset", "fast", "--group-size", "128"], ["--method", "rtn", "--group-size", "128"]]
)
def test_matrices_that_a_group_size_does_not_divide_get_smaller_groups(
    odd_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
):
    """Whether it is the preset's or asked for."""
    report = quantize(odd_model, tmp_path / "out", *options)
    assert report["group_size"] == 128
    assert report["group_sizes"] == {"64": 24, "128": 8}
    assert report["bits_per_weight"] <= 3.6
    said = capsys.readouterr()
    assert "note: 24 of 32 matrices get groups of 64 weights: 128 does not divide their input size (192)" in said.err
    assert "bits a weight in group sizes 64 (24 matrices) and 128 (8 matrices)," in said.out


def test_experts_that_nobody_could_split_get_smaller_groups(odd_model: Path, tmp_path: Path, capsys):
    """Of 128 inputs each; by default, and not where a group size is asked for."""
    report = quantize(odd_model, tmp_path / "out", "--preset", "fast")
    assert report["group_sizes"] == {"64": 30, "128": 2}
    assert report["bits_per_weight"] <= 3.6
    why = "matrices get groups of 64 weights: tensor parallelism could not cut those of 128 (128)"
    assert f"note: 6 of 32 {why}" in capsys.readouterr().err
    assert report["recipe"]["narrow"] == [[128, 64]]
    report = quantize(odd_model, tmp_path / "asked", "--preset", "fast", "--group-size", "128")
    assert report["group_sizes"] == {"64": 24, "128": 8}
    assert "narrow" not in report["recipe"]


def test_a_group_size_that_divides_everything_needs_no_note(
    odd_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    report = quantize(odd_model, tmp_path / "out", "--method", "rtn", "--group-size", "64")
    assert report["group_sizes"] == {"64": 32}
    said = capsys.readouterr()
    assert "note:" not in said.err
    assert "group size" not in said.out


@pytest.mark.parametrize(
    ("k", "wanted", "found"),
    [(4096, 128, 128), (4096, 64, 64), (192, 128, 64), (160, 128, 32), (96, 64, 32), (4096, 32, 32), (200, 128, 128)],
)
def test_group_size_of_a_matrix(k: int, wanted: int, found: int):
    """Nothing divides 200: the format's check names the matrix."""
    assert Recipe(group_size=wanted).group_size_for(k) == found


@pytest.mark.parametrize(
    ("options", "bits", "method"),
    [
        (["--preset", "small", *NONE], 3.3, "milo"),
        (["--preset", "fast", "--budget-bits", "3.4"], 3.4, "milo"),
        (["--preset", "paper-s1", "--budget-bits", "3.7"], 3.7, "paper"),
        (["--preset", "balanced", "--budget-bits", "3.5", "--group-size", "64", *NONE], 3.5, "milo"),
        (["--method", "milo", "--budget-bits", "3.8", *NONE], 3.8, "milo"),
        (["--ranks", "dense=8,sparse=4", "--budget-bits", "3.9", *NONE], 3.9, "milo"),
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
        (["--preset", "paper-s1", "--calibration", "text"], "--method paper cannot use --calibration"),
        (["--learn-steps", "-1"], "--learn-steps must be at least 0"),
        (["--budget-bits", "3.1", *NONE], "group size 128 take 3.25 bits a weight already"),
        (["--method", "paper", "--budget-bits", "3.51"], "these policies store 3.575 bits a weight at their least"),
        (["--preset", "best", "--calibration", "/nowhere.txt"], "/nowhere.txt: cannot be read as UTF-8 text"),
        (["--preset", "best", "--calibration", str(TEXT), "--calibration-windows", "0"], "must be at least 1"),
    ],
)
def test_errors(bundled_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options, message):
    assert main(["quantize", str(bundled_model), "-o", str(tmp_path / "out"), *FEW, *options]) == 1
    assert message in capsys.readouterr().err
