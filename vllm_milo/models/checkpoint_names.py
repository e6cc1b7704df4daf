"""The checkpoint's names of modules that vLLM calls otherwise. Nothing of vLLM is imported here."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

from vllm_milo.names import QKV_PARTS, leaf_of
from vllm_milo.values import CheckpointError

_DRAFT = "draft_model."
"""What vLLM calls a model that drafts for another, before the names that it has in its own checkpoint."""
_OTHERWISE = {"o_proj": "dense"}
"""What checkpoints may call a layer of vLLM, by the last parts of both: Ling-2.5's, of its latent attention."""
_STEP = ((".", "model."), ("language_model.", "language_model.model."))
_LAYERS = {
    "Step3TextForCausalLM": _STEP,  # also what vLLM says while it builds the text model of the next
    "Step3VLForConditionalGeneration": _STEP,
    "AriaForConditionalGeneration": (("language_model.model.", "language_model."),),
}
"""What names of layers begin with in what vLLM's model calls them, and in what they are in it, by architecture."""
_LAYER = re.compile(r"(?:.+\.)?layers\.[0-9]+(?=\.)")


def names_in_checkpoint(name: str, mappers: Iterable[Any]) -> list[str]:
    """Return a module's name and all others that vLLM's mappers turn into it.

    Args:
        name: vLLM's.
        mappers: vLLM's ``WeightsMapper`` objects from the checkpoint's names, in the order they apply.
    """
    names = [name]
    for mapper in reversed(list(mappers)):
        names += [found for known in list(names) for found in _undone(known, mapper) if found not in names]
    return names


def _undone(name: str, mapper: Any) -> list[str]:
    """Return the names that a mapper turns into this one, as far as its tables can be read backwards."""
    steps: list[tuple[str, Callable[[str, str, str], str]]] = [
        ("suffix", lambda text, new, old: text[: len(text) - len(new)] + old if text.endswith(new) else text),
        ("prefix", lambda text, new, old: old + text[len(new) :] if text.startswith(new) else text),
        ("substr", lambda text, new, old: text.replace(new, old, 1)),
    ]
    found = [name]
    for kind, undo in steps:
        table = getattr(mapper, f"orig_to_new_{kind}", None) or {}
        found += [undo(text, new, old) for text in list(found) for old, new in table.items() if new is not None]
    return [text for text in dict.fromkeys(found) if text != name and mapper.apply_list([text]) == [name]]


def name_in_model(name: str, architectures: Iterable[str] = ()) -> str:
    """Return the name that a module must have inside vLLM's model, which may be one that drafts for another.

    Args:
        name: what vLLM calls it.
        architectures: of the model; some call their layers otherwise than they are in it.
    """
    name = name.removeprefix(_DRAFT)
    for called, start in (pair for one in architectures for pair in _LAYERS.get(one, ())):
        if name.startswith(f"{called}layers."):
            return start + name.removeprefix(called)
    return name


def experts_in_checkpoint(name: str, known: Collection[str]) -> str:
    """Return the checkpoint's name of a layer's routed experts: vLLM's, or that of the layer's only experts.

    Args:
        name: vLLM's, which may name another block of the layer than checkpoints do.
        known: names of experts in the checkpoint, which may lack some.

    Raises:
        CheckpointError: the checkpoint has two blocks of experts in that layer, and neither has vLLM's name.
    """
    layer = _layer_of(name)
    if name in known or layer is None:
        return name
    same = sorted(other for other in known if _layer_of(other) == layer)
    if len(same) > 1:
        raise CheckpointError(
            f"{name}: the checkpoint has {' and '.join(same)}, and MiLo cannot tell which of them "
            f"vLLM means; name these experts in --ignore and convert the model again"
        )
    return same[0] if same else name


def module_in_checkpoint(name: str, known: Collection[str]) -> str:
    """Return the checkpoint's name of a linear layer: vLLM's, or that of its layer's only module with that last part.

    Where the layer has none with that, another last part is tried that checkpoints may have instead.

    Args:
        name: vLLM's, which may name another part of the layer than checkpoints do, as ``mixer`` for ``mamba``.
        known: names of modules in the checkpoint; none where it has no files.
    """
    layer = _layer_of(name)
    if name in known or layer is None:
        return name
    leaf = leaf_of(name)
    for end in (leaf, _OTHERWISE.get(leaf)):
        same = [other for other in known if leaf_of(other) == end and _layer_of(other) == layer]
        if same:
            return same[0] if len(same) == 1 else name
    return name


def values_of_keys(parts: list[str], known: Collection[str]) -> list[str]:
    """Return the matrices of attention's q, k and v where there is none of the values: keys are values there.

    Args:
        parts: names of the matrices of a linear layer; of any other layer they stay as they are.
        known: names of modules in the checkpoint; none where it has no files.
    """
    if [leaf_of(part) for part in parts] != QKV_PARTS or parts[2] in known or parts[1] not in known:
        return parts
    return [parts[0], parts[1], parts[1]]


def _layer_of(name: str) -> str | None:
    """Return the name of the decoder layer that a module belongs to."""
    found = _LAYER.match(name)
    return found[0] if found else None
