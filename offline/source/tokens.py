"""A text as the token ids of the model's own tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import ConversionError


def read_tokens(folder: Path, text: Path) -> torch.Tensor:
    """Return the token ids of a text file, by the folder's tokenizer, without special tokens.

    Raises:
        ConversionError: the file cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"{text}: cannot be read as UTF-8 text: {error}") from error
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return torch.tensor(tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"])
