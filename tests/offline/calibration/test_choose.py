"""The calibration that the command takes: the text of the package by default, a file, the model's own text, or none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from folder_edits import edit_config
from tiny_models import TEXT

from vllm_milo.offline.calibration import choose, memory
from vllm_milo.offline.checkpoint.claim import Claim
from vllm_milo.offline.checkpoint.inspect import inspect_checkpoint
from vllm_milo.offline.cli import main
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.effort import Effort
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.learn.end_to_end import TuneOptions
from vllm_milo.offline.nouns import Recipe
from vllm_milo.offline.planning.plan import Plan
from vllm_milo.offline.source.reader import ModelReader

FEW = ["--calibration-windows", "4", "--learn-steps", "2"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Conversion]:
    """The conversions that the command asks for; none is done. Windows are short."""
    found: list[Conversion] = []

    def note(plan: Plan, progress: bool, claim: Claim) -> None:
        found.append(plan.conversion)
        raise ConversionError("not done here")

    monkeypatch.setattr("vllm_milo.offline.cli.quantize.carry_out", note)
    monkeypatch.setattr(choose, "WINDOW", 32)
    return found


def quantize(source: Path, out: Path, *options: str) -> int:
    return main(["quantize", str(source), "-o", str(out), "--quiet", "--device", "cpu", *options])


@pytest.fixture
def foreign(small_model: Path, tmp_path: Path) -> Path:
    """A model that transformers cannot run."""
    folder = Path(shutil.copytree(small_model, tmp_path / "foreign"))
    edit_config(folder, hidden_act="squeezed")
    return folder


@pytest.fixture(params=["no tokenizer", "cannot run"])
def unfit(request: pytest.FixtureRequest, sources: dict[str, Path], foreign: Path) -> tuple[Path, str]:
    """A model that no text goes through, and what is said of it."""
    if request.param == "no tokenizer":
        return sources["olmoe"], "holds no tokenizer that transformers can read"
    return foreign, "cannot run this model"


def test_the_default_is_the_text_of_the_package(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choose, "WINDOW", 32)
    out = tmp_path / "out"
    assert quantize(small_model, out, *FEW) == 0
    recipe = json.loads((out / "config.json").read_text(encoding="utf-8"))["quantization_config"]["recipe"]
    assert recipe["calibration"] == "text"
    assert recipe["calibration_tokens"] == 4 * 32
    assert recipe["learn_steps"] == 2
    assert recipe["base"] == "least squares"
    assert "tune_steps" not in recipe
    assert 3.4 < inspect_checkpoint(out)["bits_per_weight"] <= 3.6
    layers = json.loads((out / "milo_report.json").read_text(encoding="utf-8"))["layers"]
    assert len(layers) == 2
    assert all(entry["after"] <= entry["before"] for entry in layers.values())


@pytest.mark.parametrize("options", [[], ["--preset", "small"], ["--method", "milo", "--ranks", "dense=8"]])
def test_effort_on_a_cpu(small_model: Path, tmp_path: Path, asked: list[Conversion], options: list[str]):
    assert quantize(small_model, tmp_path / "out", *options) == 1
    [conversion] = asked
    text = conversion.text
    assert (text.name, text.windows.shape, text.tune) == ("text", (32, 32), None)
    assert (text.learn.steps, text.learn.batch) == (16, 4)
    assert conversion.recipe.max_rounds == 2


def test_none_takes_the_robust_base(small_model: Path, tmp_path: Path, asked: list[Conversion]):
    for options in (["--calibration", "none"], ["--preset", "fast"]):
        assert quantize(small_model, tmp_path / "out", *options) == 1
        conversion = asked.pop()
        assert conversion.text is None
        assert (conversion.recipe.base, conversion.recipe.max_rounds) == ("hqq", 6)
    assert quantize(small_model, tmp_path / "out", "--preset", "fast", "--calibration", "text") == 1
    assert asked.pop().text is not None


def test_none_is_recorded(sources: dict[str, Path], tmp_path: Path):
    out = tmp_path / "out"
    assert quantize(sources["olmoe"], out, "--calibration", "none", "--max-rounds", "1") == 0
    recipe = inspect_checkpoint(out)["recipe"]
    assert recipe["calibration"] == "none"
    assert "calibration_tokens" not in recipe


def test_a_file_of_the_users(small_model: Path, tmp_path: Path, asked: list[Conversion]):
    lines = tmp_path / "a.jsonl"
    lines.write_text(json.dumps({"messages": [{"role": "user", "content": "the cat " * 99}]}), encoding="utf-8")
    found = []
    for path in (TEXT, lines):
        assert quantize(small_model, tmp_path / "out", "--calibration", str(path), *FEW) == 1
        found.append(asked.pop().text)
        assert found[-1].name == str(path)
        assert found[-1].windows.shape == (4, 32)
    assert not torch.equal(found[0].windows, found[1].windows)


def test_the_seed_chooses_documents(small_model: Path, tmp_path: Path, asked: list[Conversion]):
    for seed in ("0", "0", "1"):
        assert quantize(small_model, tmp_path / "out", "--seed", seed, *FEW) == 1
    first, again, other = (conversion.text.windows for conversion in asked)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert [conversion.text.learn.seed for conversion in asked] == [0, 0, 1]


def test_the_models_own_text(small_model: Path, tmp_path: Path, asked: list[Conversion]):
    assert quantize(small_model, tmp_path / "out", "--calibration", "self", *FEW) == 1
    text = asked[0].text
    assert text.name == "self"
    assert text.windows.shape == (4, 32)
    assert text.learn.batch == 4


def test_windows_end_where_the_models_positions_do(small_model: Path, tmp_path: Path, asked: list[Conversion]):
    folder = Path(shutil.copytree(small_model, tmp_path / "model"))
    edit_config(folder, max_position_embeddings=16)
    assert quantize(folder, tmp_path / "out", *FEW) == 1
    assert asked[0].text.windows.shape == (4, 16)


def test_best_trains_the_whole_model_where_it_fits(
    small_model: Path, tmp_path: Path, asked: list[Conversion], monkeypatch: pytest.MonkeyPatch, capsys
):
    assert quantize(small_model, tmp_path / "out", "--preset", "best") == 1
    text = asked.pop().text
    assert len(text.windows) == 2 * 32
    assert text.tune == TuneOptions(steps=48, batch=4)  # three passes
    assert quantize(small_model, tmp_path / "out", "--preset", "best", "--learn-steps", "0") == 1
    assert asked.pop().text.tune is None
    need = memory.tuning_need(ModelReader(small_model), "cpu")
    monkeypatch.setattr(memory, "available", lambda device: need - 1)
    assert quantize(small_model, tmp_path / "out", "--preset", "best", *FEW) == 1
    assert asked.pop().text.tune is None
    assert "warning: training the whole model takes" in capsys.readouterr().err


def test_best_says_how_it_trained(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choose, "WINDOW", 32)
    monkeypatch.setattr("vllm_milo.offline.effort.CPU_EFFORT", Effort(2, 2, 2))
    out = tmp_path / "out"
    assert quantize(small_model, out, "--preset", "best", "--max-rounds", "1") == 0
    recipe = inspect_checkpoint(out)["recipe"]
    assert (recipe["calibration_tokens"], recipe["learn_steps"], recipe["tune_steps"]) == (4 * 32, 2, 6)
    tuning = json.loads((out / "milo_report.json").read_text(encoding="utf-8"))["tuning"]
    assert 0 < tuning["last_kl"] < 2 * tuning["first_kl"]


def test_what_no_text_goes_through_is_quantized_without(
    unfit: tuple[Path, str], tmp_path: Path, asked: list[Conversion], capsys
):
    assert quantize(unfit[0], tmp_path / "out") == 1
    assert (asked[0].text, asked[0].recipe.base) == (None, "hqq")
    error = capsys.readouterr().err
    assert "warning: no calibration: " in error
    assert unfit[1] in error


@pytest.mark.parametrize("how", ["text", str(TEXT)])
def test_asked_for_it_is_an_error(unfit: tuple[Path, str], tmp_path: Path, asked: list[Conversion], how: str, capsys):
    assert quantize(unfit[0], tmp_path / "out", "--calibration", how) == 1
    assert not asked
    assert unfit[1] in capsys.readouterr().err


def test_a_model_that_transformers_cannot_run_is_converted(foreign: Path, tmp_path: Path, capsys):
    assert quantize(foreign, tmp_path / "out", "--max-rounds", "1") == 0
    assert inspect_checkpoint(tmp_path / "out")["recipe"]["calibration"] == "none"


@pytest.mark.parametrize("how", ["text", "self", str(TEXT)])
def test_other_methods_take_none(small_model: Path, tmp_path: Path, asked: list[Conversion], how: str, capsys):
    for options in (["--method", "paper"], ["--method", "hqq"], ["--preset", "paper-s1"]):
        assert quantize(small_model, tmp_path / "out", "--calibration", how, *options) == 1
        assert "cannot use --calibration; use --method milo" in capsys.readouterr().err
    assert not asked
    assert quantize(small_model, tmp_path / "out", "--method", "paper", "--calibration", "none") == 1
    assert asked[0].text is None


def test_the_library_refuses_it_too(small_model: Path, tmp_path: Path, asked: list[Conversion]):
    assert quantize(small_model, tmp_path / "out", *FEW) == 1
    paper = Conversion(Recipe("paper"), text=asked[0].text)
    with pytest.raises(ConversionError, match="--method paper cannot use a calibration"):
        convert(small_model, tmp_path / "out", paper, progress=False)


@pytest.mark.parametrize(
    ("option", "value", "least"),
    [("--calibration-windows", "0", 1), ("--learn-steps", "-1", 0), ("--max-rounds", "0", 1)],
)
def test_numbers_below_their_minimum(
    small_model: Path, tmp_path: Path, asked: list[Conversion], capsys, option: str, value: str, least: int
):
    assert quantize(small_model, tmp_path / "out", option, value) == 1
    assert f"{option} must be at least {least}" in capsys.readouterr().err
    assert not asked


@pytest.mark.parametrize("how", ["nowhere.txt", ""])
def test_files_that_are_not_there(small_model: Path, tmp_path: Path, asked: list[Conversion], capsys, how: str):
    name = str(tmp_path / how) if how else "."
    assert quantize(small_model, tmp_path / "out", "--calibration", name) == 1
    assert f"{name}: cannot be read as UTF-8 text" in capsys.readouterr().err
    assert not asked
