"""A text as the token ids of the model's own tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vllm_milo.values import one_line

from ..errors import ConversionError, OtherTokenizerError
from .config import read_settings, read_text_settings
from .foreign import check_settings, transformers_errors

_NO_TEXTS = {
    b"%PDF-": "is a PDF; give the text of it, as pdftotext extracts it",
    b"PK\x03\x04": "is a zip archive or an office document; give the text that is in it",
    b"\x1f\x8b": "is compressed by gzip; unpack it first",
}
"""What is given for a text, by its first bytes."""
_MARKS = {b"\xff\xfe\x00\x00": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
"""Encodings by the mark that such a text begins with."""


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a model folder.

    Raises:
        ConversionError: there is no such folder, or it holds none that transformers can read.
    """
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise ConversionError(f"{folder}: no such folder; download or convert the model first")
    if (folder / "config.json").exists():
        read_settings(folder)
    check_settings(folder)
    try:
        with transformers_errors(folder, "read the tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ConversionError as error:
        cause = one_line(error.__cause__ or error)
        raise ConversionError(f"{folder}: holds no tokenizer that transformers can read: {cause}") from error
    # without any files, transformers 5 makes up one by the model's type that knows no word
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ConversionError(f"{folder}: holds no tokenizer that transformers can read: it knows no tokens")
    return tokenizer


def read_text(path: Path) -> str:
    """Return the content of a text file.

    Raises:
        ConversionError: the file cannot be read, is a device, a PDF or an archive, is not UTF-8, or holds zero bytes.
    """
    try:
        if path.is_char_device() or path.is_block_device():  # which may never end
            raise ConversionError(f"{path}: is a device; give a file of UTF-8 text, or a pipe")
        content = path.read_text(encoding="utf-8-sig")  # editors may put a mark of the encoding first
    except OSError as error:
        why = f"{error.strerror or error}; name a text file"
        raise ConversionError(f"{path}: cannot be read as UTF-8 text: {why}") from error
    except UnicodeDecodeError as error:
        _refuse_no_text(path, error.object)
        encoding = next((name for mark, name in _MARKS.items() if error.object.startswith(mark)), "latin1")
        raise ConversionError(
            f"{path}: cannot be read as UTF-8 text: {error}; if it is text in another encoding, convert it, as by "
            f"iconv -f {encoding} -t utf-8"
        ) from error
    _refuse_no_text(path, content[:8].encode())
    if "\0" in content:
        raise ConversionError(f"{path}: holds zero bytes, as binary files do; give a UTF-8 text")
    return content


def _refuse_no_text(path: Path, start: bytes) -> None:
    """Refuse a file that begins as a known kind does that is no text."""
    for first, what in _NO_TEXTS.items():
        if start.startswith(first):
            raise ConversionError(f"{path}: cannot be read as UTF-8 text: it {what}")


def read_tokens(folder: Path, text: Path) -> torch.Tensor:
    """Return the token ids of a text file, by the folder's tokenizer, without special tokens.

    Raises:
        ConversionError: the file cannot be read, or the folder holds no tokenizer.
    """
    content = read_text(text)
    tokens = torch.tensor(load_tokenizer(folder)(content, add_special_tokens=False, verbose=False)["input_ids"])
    check_known(tokens, folder)
    return tokens


def check_known(tokens: torch.Tensor, folder: Path) -> None:
    """Refuse token ids that the model of the folder has no embedding of, by its config.json.

    Raises:
        OtherTokenizerError: names the largest.
    """
    number = read_text_settings(folder).get("vocab_size")
    largest = int(tokens.max()) if tokens.numel() else 0
    if number is not None and largest >= number:
        raise OtherTokenizerError(
            f"{folder}: its tokenizer reads the text as token {largest}, and config.json states vocab_size {number}; "
            f"is the tokenizer another model's?"
        )
