"""The documents of a calibration text: those that ship with the package, or a file of the user's.

A document is a string, or a chat: a list of messages that the model's own chat template renders. Windows are cut from
all documents in a shuffled order, one after another with the tokenizer's end token between them.
"""

from __future__ import annotations

import json
import lzma
import random
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from ..errors import ConversionError
from ..source.tokens import read_text

KINDS = ("english", "code", "math", "multilingual", "chat")
"""Files of the package's own text, ``texts/*.jsonl.xz``; ``texts/SOURCES.md`` says where they come from."""

Document = str | list[dict[str, str]]
"""A text, or the messages of a chat."""


def packaged_documents() -> list[Document]:
    """Return the documents that ship with the package: prose, code, mathematics, other languages and chats."""
    folder = files(__package__) / "texts"
    documents: list[Document] = []
    for kind in KINDS:
        content = lzma.decompress((folder / f"{kind}.jsonl.xz").read_bytes()).decode("utf-8")
        documents += parse_lines(content, f"{kind}.jsonl.xz")
    return documents


def read_documents(path: Path) -> list[Document]:
    """Return the documents of a UTF-8 file: JSON lines with ``text`` or ``messages``, or else one text.

    Raises:
        ConversionError: the file cannot be read, is not UTF-8, or a line of it has neither key.
    """
    content = read_text(path)
    return parse_lines(content, str(path)) if path.suffix == ".jsonl" else [content]


def parse_lines(content: str, name: str) -> list[Document]:
    """Return the documents of JSON lines.

    Raises:
        ConversionError: names the line that holds none.
    """
    documents: list[Document] = []
    for number, line in enumerate(content.split("\n"), start=1):  # JSON may hold other line ends
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ConversionError(f"{name}, line {number}: not JSON: {error}") from None
        found = entry.get("text", entry.get("messages")) if isinstance(entry, dict) else None
        chat = isinstance(found, list) and all(isinstance(message, dict) for message in found)
        if not found or not (chat or isinstance(found, str)):
            raise ConversionError(f'{name}, line {number}: needs "text", or "messages" of a chat')
        documents.append(found)
    return documents


def render(document: Document, tokenizer: Any) -> str:
    """Return a document as text; a chat by the tokenizer's template, or plainly where it has none that takes it."""
    if isinstance(document, str):
        return document
    if getattr(tokenizer, "chat_template", None):
        from jinja2 import TemplateError

        try:
            return str(tokenizer.apply_chat_template(document, tokenize=False))
        except TemplateError:  # raised by the template itself: it refuses a system's turn, say
            pass
    return "\n\n".join(f"{message.get('role', 'user')}: {message.get('content', '')}" for message in document)


def cut_windows(documents: Iterable[Document], tokenizer: Any, number: int, length: int, seed: int = 0) -> torch.Tensor:
    """Return up to ``number`` windows of token ids, int64 [number, length], of documents in a shuffled order.

    Raises:
        ConversionError: the documents do not fill one window.
    """
    order = list(documents)
    random.Random(seed).shuffle(order)
    ids: list[int] = []
    end = tokenizer.eos_token_id
    for document in order:
        ids += tokenizer(render(document, tokenizer), add_special_tokens=False, verbose=False)["input_ids"]
        ids += [] if end is None else [end]
        if len(ids) >= number * length:
            break
    return _windows(ids, number, length)


def _windows(ids: Sequence[int], number: int, length: int) -> torch.Tensor:
    whole = min(number, len(ids) // length)
    if whole == 0:
        raise ConversionError(f"the calibration text has {len(ids)} tokens; it needs at least {length}")
    return torch.tensor(ids[: whole * length], dtype=torch.int64).view(whole, length)
