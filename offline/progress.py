"""The progress bar of every pass over a model's layers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from .source.layers import Layer


def progress_bar(plan: Sequence[Layer], what: str, progress: bool) -> Iterator[Layer]:
    """Iterate over layers with a progress bar on stderr."""
    return iter(tqdm(plan, desc=what, unit="layer", disable=not progress, file=sys.stderr))
