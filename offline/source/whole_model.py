"""A source model in memory as a whole, as transformers runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import ConversionError


def model_class(config: Any, folder: Path) -> Any:
    """Return the class of transformers that runs a model, by its config.

    Raises:
        ConversionError: transformers has no class for the architecture.
    """
    import transformers

    name = (config.architectures or ["none"])[0]
    found = getattr(transformers, name, None)
    if found is None:
        raise ConversionError(f"{folder}: transformers {transformers.__version__} has no {name}")
    return found


def load_source_model(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """Return the unquantized Hugging Face model of a folder, in evaluation mode.

    Raises:
        ConversionError: transformers has no class for the architecture.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    with _without_bars():
        model = model_class(config, folder).from_pretrained(folder, dtype=dtype)
    return model.to(device).eval()


@contextmanager
def _without_bars() -> Iterator[None]:
    """Let transformers load a model without a progress bar of its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
