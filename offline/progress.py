"""The progress bar of every pass over a model's layers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress_bar(items: Sequence[Item], what: str, progress: bool, unit: str = "layer") -> Iterator[Item]:
    """Iterate over ``items`` with a progress bar on stderr that shows the remaining time."""
    return iter(tqdm(items, desc=what, unit=unit, disable=not progress, file=sys.stderr))
