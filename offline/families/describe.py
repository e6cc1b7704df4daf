"""The tables of families as people read them: what ``milo families`` prints, and the lists in docs/families.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm_milo.names import leaf_of

from ..nouns import Kind
from .family import Family
from .refused import REFUSED
from .table import FAMILIES

TITLES = ("model_type", "models", "quantized", "kept as it is", "status")
REFUSED_TITLES = ("model_type", "models", "refused because", "what it takes")


def rows(families: Iterable[Family] = FAMILIES.values()) -> list[dict[str, str]]:
    """Return a row for each family: its titles' values, all of them text."""
    return [
        dict(zip(TITLES, (one.model_type, one.example, _quantized(one), _kept(one), _status(one)), strict=True))
        for one in families
    ]


def refused_rows() -> list[dict[str, str]]:
    """Return a row for each family that is not converted: its titles' values."""
    return [dict(zip(REFUSED_TITLES, one[:4], strict=True)) for one in REFUSED.values()]


def markdown(titles: Sequence[str], table: Iterable[dict[str, str]]) -> str:
    """Return a table for docs/families.md, of :func:`rows` or of :func:`refused_rows`."""
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in table:
        name, *others = row.values()
        lines.append(f"| `{name}` | " + " | ".join(others) + " |")
    return "\n".join(lines)


def text() -> str:
    """Return the tables for a terminal: a family's name and models, then a line for each of the others."""
    return "\n".join([*_lines(rows()), "", "Not converted:", "", *_lines(refused_rows())])


def _lines(table: Iterable[dict[str, str]]) -> list[str]:
    lines = []
    for row in table:
        name, models, *others = row.values()
        lines.append(f"{name:<24}{models}")
        lines += [f"  {title:<16}{value}" for title, value in zip(list(row)[2:], others, strict=True)]
    return lines


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
