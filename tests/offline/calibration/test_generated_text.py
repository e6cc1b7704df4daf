"""Calibration on a text that the model itself writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vllm_milo.offline.calibration import generated_text, memory
from vllm_milo.offline.calibration.generated_text import chat_start, write_windows
from vllm_milo.offline.cli import main
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.evaluation.model import load_model
from vllm_milo.offline.evaluation.perplexity import perplexity
from vllm_milo.offline.source.reader import ModelReader
from vllm_milo.offline.source.tokens import load_tokenizer


def test_windows_are_whole_texts_of_the_model(trained_model, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(generated_text, "BATCH", 4)
    windows = write_windows(trained_model, 6, 96)
    assert windows.shape == (6, 96)
    assert windows.dtype == torch.int64
    assert (windows[:, 0] == trained_model.config.bos_token_id).all()
    assert not (windows[:, 1:] == trained_model.config.eos_token_id).any()
    assert len(windows.unique(dim=0)) == 6
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


def test_a_model_of_nan_is_named(small_model: Path):
    broken = load_model(small_model)
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ConversionError, match="probabilities are not finite"):
        write_windows(broken, 1, 8)
    with pytest.raises(ConversionError, match="must be at least 1"):
        write_windows(broken, 0, 8)


@pytest.mark.parametrize("number", [1, 4, 7])
def test_half_of_the_windows_begin_a_chat(trained_model, monkeypatch: pytest.MonkeyPatch, number: int):
    monkeypatch.setattr(generated_text, "BATCH", 2)
    chat = [7, 8, 9]
    windows = write_windows(trained_model, number, 12, chat=chat)
    assert windows.shape == (number, 12)
    begun = (windows[:, :3] == torch.tensor(chat)).all(1)
    assert int(begun.sum()) == number // 2
    assert (windows[~begun][:, 0] == trained_model.config.bos_token_id).all()
    assert len(windows.unique(dim=0)) == number


def test_the_others_go_on_from_words_of_a_text(trained_model):
    text = torch.arange(10, 10 + 3 * 200).view(3, 200)
    windows = write_windows(trained_model, 11, 200, chat=[7, 8, 9], openings=text)
    others = [window for window in windows if window[0] != 7]
    assert len(others) == 6
    lengths = []
    for window in others:
        differs = window != window[0] + torch.arange(200)
        lengths.append(int(differs.nonzero()[0]))
        row, column = divmod(int(window[0]) - 10, 200)
        assert row < 3
        assert column + lengths[-1] <= 200
    for least, found in zip((8, 8, 32, 32, 96, 96), sorted(lengths), strict=True):
        assert least <= found <= least + 4  # the model may guess a next word rightly
    again = write_windows(trained_model, 11, 200, chat=[7, 8, 9], openings=text)
    assert torch.equal(windows, again)


def test_a_start_longer_than_a_window_is_left_out(trained_model):
    windows = write_windows(trained_model, 2, 4, chat=[7, 8, 9, 10])
    assert (windows[:, 0] == trained_model.config.bos_token_id).all()


def test_the_start_of_a_chat_is_what_stands_before_a_users_words(small_model: Path):
    tokenizer = load_tokenizer(small_model)
    tokenizer.chat_template = None
    assert chat_start(tokenizer) == []
    tokenizer.chat_template = "{% for m in messages %}the {{ m.role }} says {{ m.content }} and ends{% endfor %}"
    assert chat_start(tokenizer) == tokenizer("the user says ", add_special_tokens=False)["input_ids"]
    tokenizer.chat_template = "nothing of it"
    assert chat_start(tokenizer) == []


def test_a_model_that_does_not_fit_cannot_write(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(memory, "available", lambda _: 2**20)
    out = tmp_path / "out"
    assert main(["quantize", str(small_model), "-o", str(out), "--calibration", "self", "--quiet"]) == 1
    error = capsys.readouterr().err
    device = "cuda" if torch.cuda.is_available() else "cpu"
    need = memory.gib(memory.writing_need(ModelReader(small_model), device))
    assert f"--calibration self: the model writes its text as a whole, which takes {need} on {device}" in error
    assert "use the text that comes with the package" in error
    assert not out.exists()
