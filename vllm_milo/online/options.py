"""What users choose of a model that is quantized while it is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from vllm_milo.checkpoint import GROUP_SIZES, CheckpointError
from vllm_milo.values import shown

WHERE = """--hf-overrides '{"quantization_config_dict_json": "..."}'"""


@dataclass(frozen=True)
class OnlineOptions:
    """Choices, each as of ``milo quantize --preset fast``.

    Attributes:
        budget_bits: average stored bits of a quantized weight.
        group_size: weights that share a scale and a zero point; None for 128, and 64 where no tensor parallel size
            could cut an expert otherwise.
        max_rounds: of the solver; fewer are faster and less accurate.
        ignore: modules to keep in 16 bits, by name or ``re:`` pattern.
    """

    budget_bits: float = 3.6
    group_size: int | None = None
    max_rounds: int | None = None
    ignore: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, text: str) -> OnlineOptions:
        """Read what vLLM's ``--hf-overrides`` hands over.

        Raises:
            CheckpointError: it is no JSON object, or names or holds something that is not known.
        """
        try:
            found = json.loads(text)
        except ValueError as error:
            raise CheckpointError(f"{WHERE}: is no JSON: {error}") from error
        names = [field.name for field in fields(cls)]
        if not isinstance(found, dict) or set(found) - set(names):
            raise CheckpointError(f"{WHERE}: must be a JSON object of some of {', '.join(names)}, found {shown(found)}")
        found = {name: value for name, value in found.items() if value is not None}  # null is as good as left out
        _check(found)
        if "ignore" in found:
            found["ignore"] = tuple(found["ignore"])
        return cls(**found)


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "budget_bits": (lambda value: type(value) in (int, float) and 0 < value <= 16, "a number of bits above 0"),
    "group_size": (lambda value: value in GROUP_SIZES, f"one of {', '.join(map(str, GROUP_SIZES))}"),
    "max_rounds": (lambda value: type(value) is int and value > 0, "a number above 0"),
    "ignore": (
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
        "a list of names",
    ),
}
"""What each choice must be, and how messages say that."""


def _check(found: dict[str, Any]) -> None:
    for name, value in found.items():
        fits, kind = _KINDS[name]
        if not fits(value):
            raise CheckpointError(f"{WHERE}: {name} must be {kind}, found {shown(value)}")
