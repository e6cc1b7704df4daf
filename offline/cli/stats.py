"""``milo stats``: counts how often each expert is used on a text."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from ..errors import ConversionError
from ..evaluation.expert_use import count_experts_used, refuse_to_replace
from ..evaluation.model import load_model
from ..source.tokens import read_tokens
from .arguments import add_text_arguments, check_text_arguments
from .hub import path


def add_parser(commands: Any) -> None:
    """Add the subcommand to the parser's ``commands``."""
    parser = commands.add_parser("stats", help="count how often each expert is used on a text")
    add_text_arguments(parser)
    parser.add_argument("-o", "--output", type=path, required=True, help="JSON file for --expert-counts")
    parser.set_defaults(run=_run, check=_check)


def _check(arguments: argparse.Namespace) -> None:
    check_text_arguments(arguments)
    refuse_to_replace(arguments.output)


def _run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    tokens = read_tokens(arguments.model, arguments.text)
    model = load_model(arguments.model, getattr(torch, arguments.dtype), arguments.device)
    counts = count_experts_used(model, tokens, arguments.max_windows)
    content = {"model": str(arguments.model), "text": str(arguments.text), "expert_counts": counts}
    try:
        arguments.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConversionError(f"{arguments.output}: cannot be written: {error.strerror}") from error
    print(f"{arguments.output}: uses of {sum(map(len, counts.values()))} experts in {len(counts)} layers")
