"""A source model in memory as a whole, as transformers runs it."""

from __future__ import annotations

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
    model = model_class(config, folder).from_pretrained(folder, dtype=dtype)
    return model.to(device).eval()
