"""``milo families``: prints the table of model families."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..families.describe import refused_rows, rows, text


def add_parser(commands: Any) -> None:
    """Add the subcommand to the parser's ``commands``."""
    parser = commands.add_parser(
        "families", help="print the model families that can be converted, and why others cannot"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON array")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    print(json.dumps([*rows(), *refused_rows()], indent=2) if arguments.json else text())
