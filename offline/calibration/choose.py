"""What ``--calibration`` names: the text that goes through the model while it is converted, as windows of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ConversionError
from ..source.reader import ModelReader
from ..source.streamed_model import StreamedModel, reader_tensors
from ..source.tokens import check_known, load_tokenizer
from ..source.whole_model import load_source_model
from . import memory
from .documents import Document, cut_windows, fill_windows, packaged_documents, read_documents
from .generated_text import OWN_TEXT, chat_start, write_windows
from .hub import hub_documents, hub_name
from .suitability import doubts
from .weights import refuse_broken_weights

PACKAGED = "text"
"""The text that ships with the package."""
NONE = "none"
"""No calibration."""
WINDOW = 512
"""Most tokens of a window."""
OPENINGS = 256
"""Windows of the packaged text that the model's own text takes its openings from."""


@dataclass(frozen=True)
class TextOptions:
    """How much of a text is used.

    Attributes:
        windows: most windows.
        device: where the model runs that writes its own text.
        seed: of the order of documents, and of what the model writes.
        progress: show progress bars.
    """

    windows: int = 256
    device: str = "cpu"
    seed: int = 0
    progress: bool = False


def calibration_windows(reader: ModelReader, how: str, options: TextOptions) -> torch.Tensor:
    """Return the windows of a calibration text, token ids int64 [W, T].

    Args:
        reader: the source model.
        how: ``text``, ``self``, or the name of a file or of a dataset of the Hugging Face Hub.
        options: how much of it.

    Raises:
        ConversionError, ShardError: the model, its tokenizer or the text cannot be read, the tokenizer does not fit
            the model, or the text is too short.
    """
    tokenizer = load_tokenizer(reader.folder)
    length = _length(reader)
    if how == OWN_TEXT:
        return _own_text(reader, tokenizer, length, options)
    named = None if how == PACKAGED else hub_name(how)
    if named is not None:
        rows = hub_documents(named, options.seed)
        windows = fill_windows(rows, tokenizer, options.windows, length, options.progress)
    else:
        documents = packaged_documents() if how == PACKAGED else _file_documents(how)
        windows = cut_windows(documents, tokenizer, options.windows, length, options.seed, options.progress)
    check_known(windows, reader.folder)
    return windows


def planned_windows(reader: ModelReader, how: str, options: TextOptions) -> torch.Tensor:
    """Return as many windows as :func:`calibration_windows` may, all of token 0: the text is neither cut nor written.

    What makes a text impossible is looked at all the same: the tokenizer, and whether a file can be read. A dataset of
    the Hub is not asked for.

    Raises:
        ConversionError: as :func:`calibration_windows`.
    """
    load_tokenizer(reader.folder)
    if how == OWN_TEXT:
        memory.refuse_to_write_what_does_not_fit(reader, options.device)
    elif how != PACKAGED and hub_name(how) is None:
        _file_documents(how)
    return torch.zeros(1, 1, dtype=torch.int64).expand(options.windows, _length(reader))  # takes no memory


def _file_documents(how: str) -> list[Document]:
    """Return the documents of a file, of which one must hold something."""
    documents = read_documents(Path(how))
    if not any(isinstance(document, list) or document.strip() for document in documents):
        raise ConversionError(f"{how}: holds no text; give a file with some thousand words at least")
    return documents


def _length(reader: ModelReader) -> int:
    """Return the tokens of a window."""
    return min(WINDOW, int(reader.config.get("max_position_embeddings") or WINDOW))


def remarks(folder: Path, how: str, windows: torch.Tensor, wanted: int) -> list[str]:
    """Return what a user should know of the windows [W, T] of a calibration text, before hours are spent on it."""
    found = []
    if len(windows) < wanted:
        found.append(f"note: the calibration text fills {len(windows)} windows of the {wanted} that were wanted")
    doubt = None if how in (PACKAGED, OWN_TEXT) else doubts(windows, load_tokenizer(folder))
    if doubt is not None:
        found.append(f"warning: {how}: {doubt}")
    return found


def _own_text(reader: ModelReader, tokenizer: Any, length: int, options: TextOptions) -> torch.Tensor:
    """Let the model write windows of so many tokens."""
    memory.refuse_to_write_what_does_not_fit(reader, options.device)
    refuse_broken_weights(reader, torch.device(options.device), options.progress)
    dtype = reader.dtype if torch.device(options.device).type == "cuda" else torch.float32
    openings = cut_windows(packaged_documents(), tokenizer, OPENINGS, length, options.seed)
    chat = chat_start(tokenizer)
    try:
        model = load_source_model(reader.folder, dtype, options.device)
        return write_windows(model, options.windows, length, options.seed, options.progress, chat, openings)
    except (RuntimeError, MemoryError) as error:
        if not memory.is_out_of_memory(error):
            raise
        raise ConversionError(
            f"--calibration {OWN_TEXT}: {options.device} ran out of memory while the model wrote; use the text that "
            f"comes with the package, which goes through a layer at a time"
        ) from error


def check_runs(reader: ModelReader) -> None:
    """Refuse a model that transformers cannot run a layer at a time.

    Raises:
        ConversionError: transformers has no class for it.
    """
    tensors = reader_tensors(reader.load, reader.tensors)
    if reader.family.not_learned:
        raise ConversionError(
            f"{reader.folder}: no text goes through a model of {reader.family.model_type}: {reader.family.not_learned}"
        )
    StreamedModel(reader.folder, reader.family, tensors, torch.device("meta"), torch.float32)
