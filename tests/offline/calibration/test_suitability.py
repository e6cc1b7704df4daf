"""Texts that a model's tokenizer hardly knows, or that are short, are spoken of before hours are spent on them."""

from __future__ import annotations

import json
import lzma
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TEXT
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from vllm_milo.offline import calibration
from vllm_milo.offline.calibration import choose
from vllm_milo.offline.calibration.documents import cut_windows, packaged_documents
from vllm_milo.offline.calibration.suitability import doubts, tokens_per_byte
from vllm_milo.offline.cli import main
from vllm_milo.offline.source.tokens import load_tokenizer


def foreign(part: str) -> str:
    """What comes with the package from sources of this name."""
    packed = (files(calibration.__name__) / "texts" / "multilingual.jsonl.xz").read_bytes()
    entries = map(json.loads, lzma.decompress(packed).decode("utf-8").strip().split("\n"))
    return "\n".join(entry["text"] for entry in entries if part in entry["source"])


@pytest.fixture
def tokenizer(bundled_model: Path) -> Any:
    """Of English alone, by bytes."""
    return load_tokenizer(bundled_model)


def windows(text: str, tokenizer: Any) -> torch.Tensor:
    return cut_windows([text], tokenizer, 32, 64)


@pytest.mark.parametrize("part", ["CalltoArms", "rus.html", "arb.html", "hin.html", "ell_monotonic", "tha.html"])
def test_other_scripts_are_doubted(tokenizer: Any, part: str):
    said = doubts(windows(foreign(part), tokenizer), tokenizer)
    assert said is not None
    assert said.startswith(("the tokenizer takes 0.9", "the tokenizer takes 1.0"))
    assert re.search(r"for each byte of it, and 0\.[45]\d for the text", said)
    assert "is it in a language and encoding that the model was trained on?" in said


def test_text_in_the_models_language_is_not_doubted(tokenizer: Any):
    assert doubts(windows(TEXT.read_text(encoding="utf-8"), tokenizer), tokenizer) is None
    assert doubts(cut_windows(packaged_documents(), tokenizer, 32, 64), tokenizer) is None
    for part in ("deu_1996", "fra.html", "ind.html"):  # of the same letters: worse, but something
        assert doubts(windows(foreign(part), tokenizer), tokenizer) is None


def test_a_wrong_encoding_is_doubted(tokenizer: Any):
    """UTF-8 that was read as Latin-1 and written again is UTF-8 too."""
    text = foreign("rus.html").encode("utf-8").decode("latin-1")
    assert doubts(windows(text, tokenizer), tokenizer) is not None


def test_tokens_for_each_byte_leave_special_ones_out(tokenizer: Any):
    ids = tokenizer("The old man said that he would go.", add_special_tokens=False)["input_ids"]
    plain, ended = torch.tensor([ids]), torch.tensor([[*ids, *[tokenizer.eos_token_id] * 40]])
    assert tokens_per_byte(plain, tokenizer) == len(ids) / 34
    assert tokens_per_byte(ended, tokenizer) == len(ids) / 34


def test_unknown_words_are_doubted():
    english = " ".join(str(document) for document in packaged_documents())
    words = sorted(set(english.split()))
    known = {word: number for number, word in enumerate(["<unk>", "<end>", *words])}
    model = Tokenizer(WordLevel(known, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", eos_token="<end>")
    common = [word for word in words if word.isalpha() and word.isascii()]
    assert doubts(torch.tensor([tokenizer(" ".join(common))["input_ids"][:64]]), tokenizer) is None
    strange = [word + "zzz" if number % 4 == 0 else word for number, word in enumerate(common)]
    said = doubts(torch.tensor([tokenizer(" ".join(strange))["input_ids"][:64]]), tokenizer)
    assert said is not None
    assert said.startswith("25% of its tokens stand for what the tokenizer does not know")
    tokenizer.eos_token = "<unk>"  # one token for everything special tells nothing
    assert doubts(torch.tensor([tokenizer(" ".join(strange))["input_ids"][:64]]), tokenizer) is None


@pytest.fixture
def said(bundled_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> Any:
    """What the command says of a calibration text, and how many windows it takes."""
    taken: list[int] = []
    monkeypatch.setattr(choose, "WINDOW", 64)
    monkeypatch.setattr("vllm_milo.offline.cli.quantize.print_summary", lambda summary: None)
    monkeypatch.setattr(
        "vllm_milo.offline.cli.quantize.carry_out", lambda plan, *_: taken.append(len(plan.conversion.text.windows))
    )

    def say(how: str, *options: str) -> tuple[int, str]:
        arguments = ["quantize", str(bundled_model), "-o", str(tmp_path / "out"), "--device", "cpu"]
        code = main([*arguments, "--calibration", how, *options])
        lines = capsys.readouterr().err.splitlines(keepends=True)
        told = [line for line in lines if line.startswith(("note: ", "warning: ", "milo "))]
        return taken.pop() if code == 0 else 0, "".join(told)

    return say


def test_the_command_warns(said: Any, tmp_path: Path):
    path = tmp_path / "russian.txt"
    path.write_text(foreign("rus.html") * 9, encoding="utf-8")
    assert said("text") == (32, "")
    assert said(str(TEXT)) == (32, "")
    number, error = said(str(path))
    assert number == 32
    assert error.startswith(f"warning: {path}: the tokenizer takes ")


def test_the_command_says_how_many_windows_there_are(said: Any, tmp_path: Path):
    path = tmp_path / "short.txt"
    for windows_held, options in ((10, ()), (7, ("--calibration-windows", "7"))):
        path.write_text("the " * (64 * windows_held + 10), encoding="utf-8")
        number, error = said(str(path), *options)
        assert number == windows_held
        note = f"note: the calibration text fills {number} windows of the 32 that were wanted\n"
        assert error == ("" if options else note)
    number, error = said(str(path))
    assert number == 0
    assert "it needs at least 512, 8 windows of 64; --calibration-windows 7 takes what there is" in error


@pytest.mark.parametrize(
    "content", [b"", b"\n \n", b"\x00\x01\x02\x03", b"Gr\xfc\xdfe aus K\xf6ln", b"\x1f\x8b\x08\x00"]
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_what_holds_no_text_is_refused(said: Any, tmp_path: Path, content: bytes, name: str):
    path = tmp_path / name
    path.write_bytes(content)
    number, error = said(str(path))
    assert number == 0
    found = f"{path}: cannot be read as UTF-8 text", f"{path}: holds zero bytes", f"{path}: holds no text; give"
    assert error.startswith("milo quantize: error: ")
    assert any(message in error for message in found)
