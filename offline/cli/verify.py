"""``milo verify``: whether a checkpoint is whole, undamaged and made of the model that it should be made of."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..errors import ConversionError
from ..evaluation.verify import format_verdict, verify_checkpoint
from .arguments import OR_HUB
from .hub import model_place


def add_parser(commands: Any) -> None:
    """Add the subcommand to the parser's ``commands``."""
    parser = commands.add_parser("verify", help="check a checkpoint's files, format and, with --reference, weights")
    parser.add_argument("checkpoint", type=model_place, help=f"folder of the checkpoint, {OR_HUB}")
    reference = "the model it was made of: error of each quantized matrix, and that all other tensors are the same"
    parser.add_argument("--reference", type=model_place, help=reference)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    verdict = verify_checkpoint(arguments.checkpoint, arguments.reference, not arguments.quiet)
    print(json.dumps(verdict.to_dict(), indent=2) if arguments.json else format_verdict(verdict))
    if not verdict.good:
        number = len(verdict.problems)
        raise ConversionError(f"{arguments.checkpoint}: {number} problem{'s' if number > 1 else ''} found")
