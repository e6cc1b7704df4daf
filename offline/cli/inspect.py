"""``milo inspect``: prints what a checkpoint holds."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..checkpoint.inspect import format_report, inspect_checkpoint
from .arguments import OR_HUB
from .hub import model_place


def add_parser(commands: Any) -> None:
    """Add the subcommand to the parser's ``commands``."""
    parser = commands.add_parser("inspect", help="print sizes, bits a weight, ranks and errors of a checkpoint")
    parser.add_argument(
        "checkpoint", type=model_place, help=f"folder of the checkpoint, {OR_HUB}, of which only headers are read"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run, headers_only=True)


def _run(arguments: argparse.Namespace) -> None:
    report = inspect_checkpoint(arguments.checkpoint)
    print(json.dumps(report, indent=2) if arguments.json else format_report(report))
