"""What ``--calibration`` names: the text that goes through the model while it is converted, as windows of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..source.reader import ModelReader
from ..source.streamed_model import StreamedModel, reader_tensors
from ..source.tokens import load_tokenizer
from ..source.whole_model import load_source_model
from . import memory
from .documents import cut_windows, packaged_documents, read_documents
from .generated_text import OWN_TEXT, chat_start, write_windows

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


def calibration_windows(folder: Path, how: str, options: TextOptions) -> torch.Tensor:
    """Return the windows of a calibration text, token ids int64 [W, T].

    Args:
        folder: the source model.
        how: ``text``, ``self``, or the name of a file.
        options: how much of it.

    Raises:
        ConversionError, ShardError: the model, its tokenizer or the text cannot be read, or the text is too short.
    """
    reader = ModelReader(folder)
    tokenizer = load_tokenizer(folder)
    length = min(WINDOW, int(reader.config.get("max_position_embeddings") or WINDOW))
    if how == OWN_TEXT:
        memory.refuse_to_write_what_does_not_fit(reader, options.device)
        dtype = reader.dtype if torch.device(options.device).type == "cuda" else torch.float32
        model = load_source_model(folder, dtype, options.device)
        openings = cut_windows(packaged_documents(), tokenizer, OPENINGS, length, options.seed)
        chat = chat_start(tokenizer)
        return write_windows(model, options.windows, length, options.seed, options.progress, chat, openings)
    documents = packaged_documents() if how == PACKAGED else read_documents(Path(how))
    return cut_windows(documents, tokenizer, options.windows, length, options.seed)


def check_runs(folder: Path) -> None:
    """Refuse a model that transformers cannot run a layer at a time.

    Raises:
        ConversionError: transformers has no class for it.
    """
    reader = ModelReader(folder)
    tensors = reader_tensors(reader.load, reader.tensors)
    StreamedModel(folder, reader.family, tensors, torch.device("meta"), torch.float32)
