"""The table of families as people read it: what ``milo families`` prints, and the list in docs/families.md."""

from __future__ import annotations

from collections.abc import Iterable

from vllm_milo.names import leaf_of

from ..nouns import Kind
from .family import Family
from .table import FAMILIES

TITLES = ("model_type", "models", "quantized", "kept as it is", "status")


def rows(families: Iterable[Family] = FAMILIES.values()) -> list[dict[str, str]]:
    """Return a row for each family: its titles' values, all of them text."""
    return [
        dict(zip(TITLES, (one.model_type, one.example, _quantized(one), _kept(one), _status(one)), strict=True))
        for one in families
    ]


def markdown() -> str:
    """Return the table for docs/families.md."""
    lines = ["| " + " | ".join(TITLES) + " |", "|" + "---|" * len(TITLES)]
    for row in rows():
        name, *others = row.values()
        lines.append(f"| `{name}` | " + " | ".join(others) + " |")
    return "\n".join(lines)


def text() -> str:
    """Return the table for a terminal: a family's name and models, then a line for each of the others."""
    lines = []
    for row in rows():
        name, models, *others = row.values()
        lines.append(f"{name:<18}{models}")
        lines += [f"  {title:<16}{value}" for title, value in zip(TITLES[2:], others, strict=True)]
    return "\n".join(lines)


def _quantized(family: Family) -> str:
    """Return what of a family is quantized, attention by the names of its matrices."""
    leaves = [leaf_of(slot.name).removesuffix("_proj") for slot in family.slots if slot.kind is Kind.ATTENTION]
    kinds = {slot.kind for slot in family.slots}
    ffns = [name for kind, name in ((Kind.DENSE_FFN, "dense FFN"), (Kind.SHARED_EXPERT, "shared")) if kind in kinds]
    return f"attention ({', '.join(leaves)}), {', '.join([*ffns, 'routed experts'])}"


def _kept(family: Family) -> str:
    """Return what of a family stays as it is."""
    kept = [name.removeprefix(family.in_block) for name in family.kept]
    whole = (("what predicts further tokens", family.ahead), ("what is not the text model", family.beside))
    return ", ".join([*kept, *(name for name, starts in whole if starts)])


def _status(family: Family) -> str:
    """Return how far a family has been proven, and what a user should know of it."""
    return "; ".join(filter(None, (family.status, family.note)))
