"""Calibration on a text that the model itself writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vllm_milo.offline.calibration import choose, memory
from vllm_milo.offline.calibration.generated_text import BATCH, write_windows
from vllm_milo.offline.checkpoint.inspect import inspect_checkpoint
from vllm_milo.offline.cli import main
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.evaluation.model import load_model
from vllm_milo.offline.evaluation.perplexity import perplexity


def test_windows_are_whole_texts_of_the_model(trained_model):
    windows = write_windows(trained_model, BATCH + 2, 96)
    assert windows.shape == (BATCH + 2, 96)
    assert windows.dtype == torch.int64
    assert (windows[:, 0] == trained_model.config.bos_token_id).all()
    assert not (windows[:, 1:] == trained_model.config.eos_token_id).any()
    assert len(windows.unique(dim=0)) == BATCH + 2
    # the model finds its own text likely, and a text of random tokens not
    own = perplexity(trained_model, windows.flatten(), window=96, stride=96).perplexity
    noise = torch.randint(3, trained_model.config.vocab_size, (96 * 4,))
    assert own < 0.02 * perplexity(trained_model, noise, window=96, stride=96).perplexity


def test_the_seed_decides_and_the_generator_is_left_alone(trained_model):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = (write_windows(trained_model, 2, 24, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_models_without_a_first_token_begin_elsewhere(trained_model, monkeypatch: pytest.MonkeyPatch):
    end = trained_model.config.eos_token_id
    monkeypatch.setattr(trained_model.config, "bos_token_id", None)
    assert (write_windows(trained_model, 2, 8)[:, 0] == end).all()
    monkeypatch.setattr(trained_model.config, "eos_token_id", [end])
    assert (write_windows(trained_model, 2, 8)[:, 0] == end).all()
    monkeypatch.setattr(trained_model.config, "eos_token_id", None)
    assert len(write_windows(trained_model, 4, 8)[:, 0].unique()) > 1


def test_a_model_of_nan_is_named(bundled_model: Path):
    broken = load_model(bundled_model)
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ConversionError, match="probabilities are not finite"):
        write_windows(broken, 1, 8)
    with pytest.raises(ConversionError, match="must be at least 1"):
        write_windows(broken, 0, 8)


@pytest.mark.parametrize("moments", ["full", "inputs"])
def test_best_needs_no_text(bundled_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moments: str):
    monkeypatch.setattr(choose, "WINDOW", 64)
    out = tmp_path / "out"
    options = ["--preset", "best", "--calibration-windows", "3", "--calibration-moments", moments, "--max-rounds", "1"]
    assert main(["quantize", str(bundled_model), "-o", str(out), "--quiet", *options]) == 0
    recipe = inspect_checkpoint(out)["recipe"]
    assert (recipe["calibration"], recipe["calibration_tokens"]) == ("self", 3 * 64)
    assert recipe["calibration_moments"] == moments


def test_a_model_that_does_not_fit_cannot_write(
    bundled_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(memory, "available", lambda _: 2**20)
    out = tmp_path / "out"
    assert main(["quantize", str(bundled_model), "-o", str(out), "--calibration", "self", "--quiet"]) == 1
    error = capsys.readouterr().err
    assert "--calibration self: the model writes its text as a whole, which takes 0.01 GiB on" in error
    assert "pass a text" in error
    assert not out.exists()
