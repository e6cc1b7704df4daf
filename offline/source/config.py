"""Reads a model's config.json, and refuses what could not be one before anything relies on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_milo.shards import read_object
from vllm_milo.values import require_int

from ..errors import ConversionError
from ..families.find import configs_within, text_settings

_MOST = {
    "num_hidden_layers": 1000,
    "num_layers": 1000,
    "hidden_size": 2**20,
    "vocab_size": 2**24,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "intermediate_size": 2**24,
    "moe_intermediate_size": 2**24,
    "shared_expert_intermediate_size": 2**24,
    "max_position_embeddings": 2**53,
    "num_experts": 2**16,
    "num_local_experts": 2**16,
    "n_routed_experts": 2**16,
    "zero_expert_num": 2**16,
    "moe_num_experts": 2**16,
    "moe_topk": 2**16,
    "num_experts_per_tok": 2**16,
    "decoder_sparse_step": 2**31,
}
"""The most that no model comes near, of what the converter or transformers make so many of; each may be missing."""
_LISTS = ("moe_intermediate_size", "shared_expert_intermediate_size", "moe_num_experts", "moe_topk")
"""Keys that may hold a list, with a number for each layer or kind of expert."""
CHOSEN_KEYS = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
"""Of config.json: how many experts a token goes to."""


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the config.json of a model folder or of a checkpoint.

    Raises:
        ConversionError: a number is none, or is larger than that of any model.
        ShardError: the file is missing, unreadable, or holds no JSON object.
    """
    path = folder / "config.json"
    config = read_object(path)
    check_numbers(config, path)
    return config


def read_text_settings(folder: Path) -> dict[str, Any]:
    """Return what the config.json of a model folder or checkpoint states of the text model.

    Raises:
        ConversionError, ShardError: see :func:`read_settings`; or the file has no part for the text model.
    """
    return text_settings(read_settings(folder))


def check_numbers(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a config whose numbers are none, or are larger than those of any model; those within it are looked at too.

    Raises:
        ConversionError: names the file and the key.
    """

    def error(message: str) -> ConversionError:
        return ConversionError(f"{path}: {message}; copy the file again")

    for part in configs_within(config):
        for key, most in _MOST.items():
            value = part.get(key)
            for one in value if isinstance(value, list) and key in _LISTS else [value]:
                require_int({key: one}, key, 0, most, error)


def chosen_experts(settings: Mapping[str, Any]) -> int | None:
    """Return how many experts of a layer a token goes to, by the text model's settings; None where they do not say.

    Where each layer has its own number, it is the first layer's.
    """
    for key in CHOSEN_KEYS:
        value = settings.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if type(value) is int and value > 0:
            return value
    return None


def stated(config: Mapping[str, Any], key: str, folder: Path) -> int:
    """Return a number of a checked config that must be there.

    Raises:
        ConversionError: it is missing, null or 0.
    """
    value = config.get(key)
    if not value:
        raise ConversionError(f"{folder / 'config.json'}: has no {key}; copy the file again")
    return int(value)
