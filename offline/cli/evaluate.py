"""``milo eval``: prints the perplexity of a model or a MiLo checkpoint."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from ..evaluation.model import load_model
from ..evaluation.perplexity import STRIDE, WINDOW, perplexity
from ..source.tokens import read_tokens
from .arguments import add_text_arguments


def add_parser(commands: Any) -> None:
    """Add the subcommand to the parser's ``commands``."""
    parser = commands.add_parser("eval", help="print the perplexity of a model or MiLo checkpoint")
    add_text_arguments(parser)
    parser.add_argument("--window", type=int, default=WINDOW, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--stride", type=int, default=STRIDE, help="tokens between windows (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    result = perplexity(
        load_model(arguments.model, getattr(torch, arguments.dtype), arguments.device),
        read_tokens(arguments.model, arguments.text),
        arguments.max_windows,
        window=arguments.window,
        stride=arguments.stride,
        progress=not arguments.quiet,
    )
    if arguments.json:
        print(json.dumps({"model": str(arguments.model), "text": str(arguments.text), **result._asdict()}))
    else:
        print(f"perplexity {result.perplexity:.4f} over {result.tokens} tokens in {result.windows} windows")
        print(f"protocol: {result.protocol}; {arguments.dtype}; text {arguments.text}")
