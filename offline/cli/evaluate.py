"""``milo eval``: prints what texts say of a model or MiLo checkpoint: its perplexity, or how far it is from another."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import ConversionError
from ..evaluation import comparison
from ..evaluation.divergence import compare
from ..evaluation.model import load_model
from ..evaluation.perplexity import STRIDE, WINDOW, perplexity
from ..source.tokens import read_tokens
from .arguments import add_text_arguments, check_text_arguments

REFERENCE_HELP = """folder of the unquantized model that MODEL was made from: print the KL divergence from it, and how
often both find the same token the likeliest. Both go through disjoint windows a layer at a time, so neither must fit
into memory as a whole."""
WINDOW_HELP = f"tokens of a window, at most (default: {WINDOW}; with --reference {comparison.WINDOW})"


def add_parser(commands: Any) -> None:
    """Add the subcommand to the parser's ``commands``."""
    parser = commands.add_parser("eval", help="print the perplexity of a model, or how far it is from its reference")
    add_text_arguments(parser, several=True)
    parser.add_argument("--reference", type=Path, metavar="MODEL", help=REFERENCE_HELP)
    parser.add_argument("--window", type=int, help=WINDOW_HELP)
    parser.add_argument("--stride", type=int, help=f"tokens between windows (default: {STRIDE}); not with --reference")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    check_text_arguments(arguments)
    if arguments.reference is None:
        _print_perplexity(arguments)
    else:
        _print_divergence(arguments)


def _print_perplexity(arguments: argparse.Namespace) -> None:
    texts = [(text, read_tokens(arguments.model, text)) for text in arguments.text]
    model = load_model(arguments.model, getattr(torch, arguments.dtype), arguments.device)
    found = [
        perplexity(
            model,
            tokens,
            arguments.max_windows,
            window=WINDOW if arguments.window is None else arguments.window,
            stride=STRIDE if arguments.stride is None else arguments.stride,
            progress=not arguments.quiet,
        )
        for _, tokens in texts
    ]
    if arguments.json:
        rows = [{"text": str(text), **of._asdict()} for text, of in zip(arguments.text, found, strict=True)]
        print(json.dumps({"model": str(arguments.model), "texts": rows}))
        return
    cells = [
        [str(text), f"{of.perplexity:.4f}", str(of.windows), str(of.tokens)]
        for text, of in zip(arguments.text, found, strict=True)
    ]
    _print_table(["text", "perplexity", "windows", "tokens"], cells)
    print(f"protocol: {found[0].protocol}; {arguments.dtype}")


def _print_divergence(arguments: argparse.Namespace) -> None:
    if arguments.stride is not None:
        raise ConversionError("--stride: windows are disjoint with --reference; drop one of the two")
    options = comparison.Options(
        window=comparison.WINDOW if arguments.window is None else arguments.window,
        max_windows=arguments.max_windows,
        device=arguments.device,
        dtype=getattr(torch, arguments.dtype),
        progress=not arguments.quiet,
    )
    found = compare(arguments.model, arguments.reference, arguments.text, options)
    mean = sum(of.kl for of in found) / len(found)
    if arguments.json:
        names = {"model": str(arguments.model), "reference": str(arguments.reference)}
        print(json.dumps({**names, "texts": [of._asdict() for of in found], "mean_kl": mean}))
        return
    cells = [
        [
            of.text,
            f"{of.kl:.4f}",
            f"{of.top1:.4f}",
            f"{of.perplexity:.4f}",
            f"{of.reference_perplexity:.4f}",
            str(of.windows),
            str(of.tokens),
        ]
        for of in found
    ]
    if len(found) > 1:
        cells.append(["mean", f"{mean:.4f}", "", "", "", "", ""])
    _print_table(["text", "KL", "top-1", "perplexity", "reference's", "windows", "tokens"], cells)
    length = found[0].tokens // found[0].windows + 1
    print(f"KL in nats a token from {arguments.reference}; disjoint windows of {length} tokens; {arguments.dtype}")


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under a head: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())
