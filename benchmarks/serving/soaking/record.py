"""The record of a soak, on disk from the first answers on: a machine may be taken away while the soak runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.records import write_json, write_text
from benchmarks.serving.soaking.report import Stage, find_notes, find_problems, format_report


class Record:
    """What a soak has found so far, as JSON and, beside it, as Markdown.

    Args:
        output: the JSON file.
        known: what is known before the server runs.
    """

    def __init__(self, output: Path, known: Mapping[str, Any]) -> None:
        self.found = dict(known)
        self._output = output

    def write(self, stage: Stage, **found: Any) -> None:
        """Add what a stage found, judge all there is, and write both files in place of the last ones."""
        self.found |= {"stage": stage, **found}
        self.found |= {"problems": find_problems(self.found), "notes": find_notes(self.found)}
        write_json(self._output, self.found)
        write_text(self._output.with_suffix(".md"), format_report(self.found) + "\n")
