"""``milo inspect``: prints what a checkpoint holds."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from ..checkpoint.claim import refuse_unfinished
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
    refuse_unfinished(Path(arguments.checkpoint))
    report = inspect_checkpoint(arguments.checkpoint)
    print(json.dumps(_finite(report), indent=2) if arguments.json else format_report(report))


def _finite(value: Any) -> Any:
    """Return what JSON can hold: null for NaN and infinity, which a recipe may hold."""
    if isinstance(value, dict):
        return {key: _finite(held) for key, held in value.items()}
    if isinstance(value, list):
        return [_finite(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
