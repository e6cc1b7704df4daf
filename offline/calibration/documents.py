"""The documents of a calibration text: those that ship with the package, or a file of the user's.

A document is a string, or a chat: a list of messages that the model's own chat template renders. Windows are cut from
all documents in a shuffled order, one after another with the tokenizer's end token between them.
"""

from __future__ import annotations

import json
import lzma
import random
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from ..errors import ConversionError
from ..progress import progress_bar
from ..source.tokens import read_text

KINDS = ("english", "code", "math", "multilingual", "chat")
"""Files of the package's own text, ``texts/*.jsonl.xz``; ``texts/SOURCES.md`` says where they come from."""

COLUMNS = ("text", "messages", "conversations")
"""Where an entry of a file or dataset may hold its text or its chat."""
MIN_WINDOWS = 8
"""A text that fills fewer is refused, unless no more are asked for."""
_ROLES = {"human": "user", "gpt": "assistant"}

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
    """Return the documents of a UTF-8 file: JSON lines with one of :data:`COLUMNS`, or else one text.

    Raises:
        ConversionError: the file cannot be read, is not UTF-8, or a line of it has none of them.
    """
    content = read_text(path)
    return parse_lines(content, str(path)) if path.suffix.lower() == ".jsonl" else [content]


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
            json.dumps(entry, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ConversionError(f"{name}, line {number}: holds half of a surrogate pair, which is no text") from None
        except (ValueError, RecursionError) as error:
            raise ConversionError(f"{name}, line {number}: not JSON: {error}") from None
        document = document_of(entry) if isinstance(entry, dict) else None
        if document is None:
            raise ConversionError(f'{name}, line {number}: needs "text", or "messages" of a chat')
        documents.append(document)
    return documents


def document_of(entry: Mapping[str, Any]) -> Document | None:
    """Return the text or chat of an entry in the first of :data:`COLUMNS` that it has; None if that holds none."""
    found = next((entry[column] for column in COLUMNS if column in entry), None)
    if not found or not isinstance(found, str | list):
        return None
    if isinstance(found, str):
        return found
    if not all(isinstance(turn, dict) for turn in found):
        return None
    messages = [_message(turn) for turn in found]
    return messages if any(_said(message).strip() for message in messages) else None


def _message(turn: Mapping[str, Any]) -> dict[str, str]:
    """Return a turn as chat templates take it; conversations are also written as ``from`` and ``value``."""
    if "value" not in turn or "content" in turn:
        return dict(turn)
    speaker = str(turn.get("from", "user"))
    return {"role": _ROLES.get(speaker, speaker), "content": turn["value"]}


def _said(message: Mapping[str, Any]) -> str:
    """Return the text of a message, which may come in parts; none where it only calls a tool."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return "" if content is None else str(content)


def render(document: Document, tokenizer: Any) -> str:
    """Return a document as text; a chat by the tokenizer's template, or plainly where it has none that takes it."""
    if isinstance(document, str):
        return document
    if getattr(tokenizer, "chat_template", None):
        from jinja2 import TemplateError

        try:
            return str(tokenizer.apply_chat_template(document, tokenize=False))
        except (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
            pass  # raised by the template itself: it refuses a system's turn, say, or trips over what is in one
    turns = ((message.get("role") or "user", _said(message)) for message in document)
    return "\n\n".join(f"{role}: {said}" for role, said in turns if said)


def cut_windows(
    documents: Iterable[Document], tokenizer: Any, number: int, length: int, seed: int = 0, progress: bool = False
) -> torch.Tensor:
    """Return up to ``number`` windows of token ids, int64 [number, length], of documents in a shuffled order.

    Raises:
        ConversionError: the documents fill too few windows.
    """
    order = list(documents)
    random.Random(seed).shuffle(order)
    return fill_windows(order, tokenizer, number, length, progress)


def fill_windows(
    documents: Iterable[Document], tokenizer: Any, number: int, length: int, progress: bool = False
) -> torch.Tensor:
    """Return up to ``number`` windows of token ids, int64 [number, length], of as many documents as it takes.

    Raises:
        ConversionError: the documents fill too few windows.
    """
    ids: list[int] = []
    end = tokenizer.eos_token_id
    reading = iter(documents)
    for window in progress_bar(range(number), "read text", progress, unit="window"):
        while len(ids) < (window + 1) * length:
            document = next(reading, None)
            if document is None:
                return _windows(ids, number, length)
            ids += tokenizer(render(document, tokenizer), add_special_tokens=False, verbose=False)["input_ids"]
            ids += [] if end is None else [end]
    return _windows(ids, number, length)


def _windows(ids: Sequence[int], number: int, length: int) -> torch.Tensor:
    whole, least = min(number, len(ids) // length), min(number, MIN_WINDOWS)
    if whole < least:
        small = f"; --calibration-windows {whole} takes what there is" if whole else ""
        raise ConversionError(
            f"the calibration text has {len(ids)} tokens; it needs at least {least * length}, {least} windows of "
            f"{length}{small}"
        )
    return torch.tensor(ids[: whole * length], dtype=torch.int64).view(whole, length)
