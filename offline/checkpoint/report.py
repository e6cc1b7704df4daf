"""The report that lies in every checkpoint: what the conversion measured of each matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

REPORT_NAME = "milo_report.json"


class MatrixReport(NamedTuple):
    """What the report file says of one matrix: relative error, rank, rounds."""

    error: float
    rank: int
    rounds: int


def report_file(report: Mapping[str, MatrixReport]) -> dict[str, Any]:
    """Return what the report file holds."""
    return {
        "relative_error": "|W - W'| / |W|, Frobenius, everything as stored",
        "matrices": {name: entry._asdict() for name, entry in report.items()},
    }
