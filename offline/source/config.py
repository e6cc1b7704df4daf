"""Reads a source model's config.json, and refuses what could not be one before anything relies on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_milo.shards import read_object

from ..errors import ConversionError

_NUMBERS = (
    *("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads"),
    *("max_position_embeddings", "num_experts", "num_local_experts", "num_experts_per_tok", "decoder_sparse_step"),
)
"""Keys that the converter reads as numbers; each may be missing or null."""


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of an unquantized model.

    A ``quantization_config`` that is null, as some tools write it, means none.

    Raises:
        ConversionError: the model is quantized already, or a number is none.
        ShardError: the file is missing, unreadable, or holds no JSON object.
    """
    path = folder / "config.json"
    config = read_object(path)
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise ConversionError(f"{path}: the model is quantized already ({method}); convert the original")
    config.pop("quantization_config", None)
    for key in _NUMBERS:
        value = config.get(key)
        if value is not None and (type(value) is not int or value < 0):
            raise ConversionError(f"{path}: {key} is {value!r}, but must be a whole number; copy the file again")
    return config
