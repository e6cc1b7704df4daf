"""``milo import`` and ``milo export``: MiLo checkpoints from and for other tools, with the same weights."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..checkpoint.card import CardNotes
from ..checkpoint.inspect import inspect_checkpoint
from ..exporting.exporter import FORMATS, export_checkpoint
from ..importing.importer import import_checkpoint
from .arguments import OR_HUB, command_of
from .hub import model_place, path
from .summary import serve_lines


def add_parser(commands: Any) -> None:
    """Add the subcommands to the parser's ``commands``."""
    parser = commands.add_parser(
        "import", help="make a MiLo checkpoint of a 3-bit GPTQ or compressed-tensors one, with the same weights"
    )
    parser.add_argument("model", type=model_place, help=f"folder of the other tool's checkpoint, {OR_HUB}")
    parser.add_argument("-o", "--output", type=path, required=True, help="folder of the MiLo checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing MiLo checkpoint")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=_import)
    parser = commands.add_parser(
        "export", help="make a checkpoint of another tool of a MiLo one without compensators, with the same weights"
    )
    parser.add_argument("checkpoint", type=model_place, help=f"folder of the MiLo checkpoint, {OR_HUB}")
    parser.add_argument("-o", "--output", type=path, required=True, help="folder of the other tool's checkpoint")
    parser.add_argument("--format", choices=FORMATS, required=True, help="pack-quantized, of compressed-tensors")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=_export)


def _import(arguments: argparse.Namespace) -> None:
    notes = CardNotes(command_of(arguments))
    imported = import_checkpoint(
        arguments.model, arguments.output, arguments.overwrite, notes, progress=not arguments.quiet
    )
    _print_notes(imported.notes)
    bits = inspect_checkpoint(imported.out)["bits_per_weight"]
    print(
        f"{imported.out}: {imported.matrices} matrices of {imported.title}, all weights the same, {bits:.3f} bits a "
        f"weight, no compensators\n{serve_lines(imported.out)}"
    )


def _export(arguments: argparse.Namespace) -> None:
    exported = export_checkpoint(
        arguments.checkpoint, arguments.output, command_of(arguments), progress=not arguments.quiet
    )
    _print_notes(exported.notes)
    print(f"{exported.out}: {exported.matrices} matrices for {arguments.format}, all weights the same")


def _print_notes(notes: list[str]) -> None:
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
