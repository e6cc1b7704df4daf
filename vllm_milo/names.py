"""Names of modules: which role a matrix has by the last part of its name, and tables of names. Pure Python.

The converter gives ranks by role, the plugin fuses layers by it, and the checkpoint's rank table has these names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache

from .patterns import Pattern, PatternError
from .values import CheckpointError, shown

MOST_PATTERNS = 300
"""Of a table of names."""
EXPERT_PROJECTIONS = {
    "gate_proj": "gate",
    "w1": "gate",
    "up_proj": "up",
    "w3": "up",
    "down_proj": "down",
    "w2": "down",
}
"""Role of an FFN's projection by its name in the checkpoint. Mixtral, PhiMoE and vLLM's loader say w1, w3, w2."""

FUSED_LAYERS = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
    "fused_wqa_wkv": ["wq_a", "wkv"],  # DeepSeek-V4's
    "in_proj_qkvgfab": ["q_proj", "k_proj", "v_proj", "f_a_proj", "b_proj"],  # Kimi-Linear's
}
"""Parts of vLLM's fused layers, in order; models list only some of them in ``packed_modules_mapping``."""

QKV_PARTS = FUSED_LAYERS["qkv_proj"]
"""The projections that read attention's input, in vLLM's order q, k, v."""

ROUTERS = ("gate", "router", "shared_expert_gate")
"""Layers that choose or weigh experts; they are never quantized."""


_EXPERT_MATRIX = re.compile(r"(?P<experts>.+\.experts)\.(?P<index>0|[1-9][0-9]{0,8})\.(?P<projection>[^.]+)")


def leaf_of(module: str) -> str:
    """Return the last part of a module's name."""
    return module.rpartition(".")[2]


def split_expert_name(name: str) -> tuple[str, int, str] | None:
    """Split ``….experts.3.gate_proj`` into (``….experts``, 3, ``gate_proj``); None for any other module."""
    match = _EXPERT_MATRIX.fullmatch(name)
    return (match["experts"], int(match["index"]), match["projection"]) if match else None


Names = Callable[[str], Iterable[str]]
"""Returns all names of a module by one of them."""


class Keys:
    """Exact names and ``re:`` patterns, as tables of a checkpoint have them.

    Args:
        keys: of the table, in order.
        called: returns all names of a module, which patterns may match; None where it has one.

    Raises:
        CheckpointError: a pattern is none that is read here (:mod:`.patterns`), or there are too many.
    """

    def __init__(self, keys: Iterable[str], called: Names | None = None) -> None:
        self._keys = dict.fromkeys(keys)
        self._called = called
        texts = [key for key in self._keys if key.startswith("re:")]
        if len(texts) > MOST_PATTERNS:
            raise CheckpointError(
                f"quantization_config: {len(texts)} patterns, more than {MOST_PATTERNS}; write one for several layers"
            )
        self._patterns = [(key, _compile(key)) for key in reversed(texts)]

    def __reduce__(self) -> tuple[type[Keys], tuple[list[str], Names | None]]:
        return Keys, (list(self._keys), self._called)

    def find(self, name: str) -> str | None:
        """Return the key that holds for ``name``: the exact name, else the last pattern that matches one of its names.

        A module that patterns know by several names has its exact key under ``name``.
        """
        if name in self._keys or not self._patterns:
            return name if name in self._keys else None
        names = [name] if self._called is None else list(self._called(name))
        return next((key for key, pattern in self._patterns if any(map(pattern.fullmatch, names))), None)


@lru_cache(maxsize=2 * MOST_PATTERNS)
def _compile(key: str) -> Pattern:
    try:
        return Pattern(key[3:])
    except PatternError as error:
        raise CheckpointError(
            f"quantization_config: {shown(key)} is not a regular expression of names: {error}"
        ) from None


def find_key(table: Iterable[str], name: str) -> str | None:
    """Return the key of ``table`` that holds for ``name``: the exact name, else the last matching ``re:``.

    Raises:
        CheckpointError: see :class:`Keys`.
    """
    return Keys(table).find(name)
