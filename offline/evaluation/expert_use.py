"""How often the router picks each expert on a text: ``milo stats``, for the frequency policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vllm_milo.names import leaf_of
from vllm_milo.shards import ShardError, read_json

from ..errors import ConversionError
from ..families.find import find_family
from .perplexity import WINDOW, perplexity

_MAKE_THEM = "make it with `milo stats MODEL --text FILE -o"


def count_experts_used(model: Any, tokens: torch.Tensor, max_windows: int | None = None) -> dict[str, list[int]]:
    """Return how often the router picks each expert on a text, by experts' name in the checkpoint."""
    family = find_family(model.config.to_dict())
    settings = family.settings(model.config.to_dict())
    number = family.num_experts(settings)
    counts: dict[str, torch.Tensor] = {}

    def counter(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            chosen = args[1] if len(args) > 1 else kwargs["top_k_index"]
            counts[name] += torch.bincount(chosen.flatten().cpu(), minlength=number)

        return hook

    hooks = []
    for name, module in model.named_modules():
        if leaf_of(name) == "experts":
            experts = family.checkpoint_name(name)
            counts[experts] = torch.zeros(number, dtype=torch.int64)
            hooks.append(module.register_forward_pre_hook(counter(experts), with_kwargs=True))
    window = min(WINDOW, int(settings["max_position_embeddings"]))
    try:
        perplexity(model, tokens, max_windows, window=window, stride=window)  # no token counts twice
    finally:
        for handle in hooks:
            handle.remove()
    return {name: count.tolist() for name, count in counts.items()}


def read_expert_counts(path: Path) -> dict[str, list[int]]:
    """Read a file that ``milo stats`` wrote.

    Raises:
        ConversionError: the file is not of that form.
    """
    if not path.is_file():
        raise ConversionError(f"{path}: no such file; {_MAKE_THEM} {path}`")
    content = read_json(path)
    counts = content.get("expert_counts") if isinstance(content, dict) else None
    if not isinstance(counts, dict) or not all(map(_are_counts, counts.values())):
        raise ConversionError(f"{path}: no expert_counts; {_MAKE_THEM} {path}`")
    return counts


def refuse_to_replace(path: Path) -> None:
    """Refuse to write counts over a file that holds something else, or into a folder that is not there.

    Raises:
        ConversionError: says what is in the way.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise ConversionError(f"{path}: cannot be written: it must be a file in a folder that exists")
    if not path.is_file():
        return
    try:
        read_expert_counts(path)
    except (ConversionError, ShardError):
        raise ConversionError(f"{path}: exists and holds no expert counts, so it is kept; name another file") from None


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**53 for value in values)
