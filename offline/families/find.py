"""The family of a model by its config.json; for others, what is known of them and which family is nearest."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_milo.values import shown

from ..errors import FamilyError
from .family import Family
from .refused import REFUSED, Refused
from .table import FAMILIES

_EXPERT_COUNTS = (
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"),
    *("num_moe_experts", "ffn_num_experts"),
)
"""config.json keys that any model has its number of routed experts under."""
_DEEPEST = 3
"""Levels of configs within each other, as a text model's in one for images."""
_LIST = "`milo families` lists those that it does"

_ALIKE = 0.7
"""How much alike two names must be, by difflib's measure, for one to be meant by the other: llama is no jamba (0.6)."""


def find_family(config: Mapping[str, Any]) -> Family:
    """Return the family of a model by its config.json.

    Raises:
        FamilyError: the family is unknown or refused, or is known but this model has no experts.
    """
    model_type = config.get("model_type")
    said = f"config.json: model_type {shown(model_type)}"
    text = next(filter(counts_experts, configs_within(config)), None)
    refused = None if text is None else _refused(config, text)
    if refused is not None:
        raise FamilyError(
            f"{said} ({refused.example}) is a MoE family that MiLo does not convert: {refused.why}; that takes "
            f"{refused.needed}; {_LIST}"
        )
    family = FAMILIES.get(str(model_type))
    if family is not None:
        family.num_experts(family.settings(config))
        return family
    if text is None:
        raise FamilyError(
            f"{said} is not a Mixture-of-Experts model: it states no number of experts; MiLo converts such models "
            f"alone, {_LIST}"
        )
    own = text.get("model_type")
    if text is not config and str(own) in FAMILIES:
        raise FamilyError(
            f"{said} is a larger model around the text model {shown(own)}, which MiLo converts alone: save that part "
            f"by itself first"
        )
    inner = "" if text is config or own is None else f" around a text model {shown(own)}"
    raise FamilyError(f"{said}{inner} is a MoE family that MiLo does not know{_nearest(model_type, own)}; {_LIST}")


def text_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config.json states of the text model, of a family that is known or of any.

    Raises:
        ConversionError: see :meth:`Family.settings`.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    return dict(config) if family is None else family.settings(config)


def configs_within(config: Mapping[str, Any], level: int = 0) -> Iterator[Mapping[str, Any]]:
    """Yield a config and those within it, as models for images have one for their text model."""
    yield config
    for part in config.values() if level < _DEEPEST else ():
        if isinstance(part, Mapping):
            yield from configs_within(part, level + 1)


def counts_experts(config: Mapping[str, Any]) -> bool:
    """Return whether a config itself, not one within it, states a number of experts."""
    return any(_is_count(config.get(key)) for key in _EXPERT_COUNTS)


def _refused(config: Mapping[str, Any], text: Mapping[str, Any]) -> Refused | None:
    """Return the refused family that a config or its text model's part belongs to; None where there is none."""
    named = config.get("architectures")
    architectures = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    for one in REFUSED.values():
        if one.model_type in (config.get("model_type"), text.get("model_type")):
            return one
        if any(name in one.architectures for name in architectures):
            return one
    return None


def _is_count(value: object) -> bool:
    """Return whether a value counts experts; a list has a number for each layer or kind."""
    return any(map(_is_count, value)) if isinstance(value, list) else type(value) is int and value > 1


def _nearest(*names: object) -> str:
    """Return what to say of the family whose name is most like one of these; nothing where none is."""
    for name in names:
        if near := difflib.get_close_matches(str(name), FAMILIES, n=1, cutoff=_ALIKE):
            return f"; the nearest that it knows is {near[0]}"
    return ""
