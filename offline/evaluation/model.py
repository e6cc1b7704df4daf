"""A source model or a MiLo checkpoint as a model of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vllm_milo.validation import validate_checkpoint

from ..checkpoint.dequantize import DequantizedTensors
from ..errors import ConversionError
from ..source.foreign import load_config
from ..source.whole_model import fill_model, load_source_model, model_class


def load_model(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """Return the Hugging Face model of a folder; MiLo checkpoints get the weights s·(q - z) + UᵀV.

    Raises:
        ConversionError: no such folder, or transformers has no class for the architecture.
        CheckpointError, ShardError: the MiLo checkpoint is broken.
    """
    if not (folder / "config.json").is_file():
        raise ConversionError(f"{folder}: no folder with a config.json; download or convert the model first")
    config = load_config(folder)
    if not getattr(config, "quantization_config", None):
        return load_source_model(folder, dtype, device)
    found = model_class(config, folder)
    fmt = validate_checkpoint(folder)
    del config.quantization_config
    state = dict(DequantizedTensors(folder, fmt, dtype).load())
    return fill_model(found, folder, config, state, dtype).to(device).eval()
