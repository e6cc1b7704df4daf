"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..errors import ConversionError
from ..planning.devices import find_device
from .hub import model_place

DTYPES = ("float32", "bfloat16", "float16")
"""Names of the dtypes that a model can be run in."""
OR_HUB = "or org/name or org/name@revision of the Hugging Face Hub"
MOST = 10**9
"""Of what options count: windows, steps, rounds."""


def add_text_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Add what every subcommand takes that runs a model on a text."""
    parser.add_argument("model", type=model_place, help=f"folder of a source model or MiLo checkpoint, {OR_HUB}")
    number = {"nargs": "+"} if several else {}
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text file", **number)  # type: ignore[arg-type]
    parser.add_argument("--max-windows", type=int, default=None)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def check_text_arguments(arguments: argparse.Namespace) -> None:
    """Refuse a device that torch does not have, texts that are not there, and windows that leave nothing to score.

    This comes before a model is downloaded or loaded.

    Raises:
        ConversionError: names the option.
    """
    name, windows = arguments.device, arguments.max_windows
    find_device(name)
    check_number("max_windows", windows, 1)
    for text in arguments.text if isinstance(arguments.text, list) else [arguments.text]:
        if not text.exists():
            raise ConversionError(f"{text}: cannot be read as UTF-8 text: No such file or directory")


def check_number(name: str, value: int | None, least: int) -> None:
    """Refuse the number of an option that is smaller than ``least``, or larger than any that does anything.

    Raises:
        ConversionError: names the option.
    """
    if value is not None and value < least:
        raise ConversionError(f"{_option(name)} must be at least {least}")
    if value is not None and value > MOST:
        raise ConversionError(f"{_option(name)} must be at most {MOST}")


def _option(name: str) -> str:
    """Return how a parsed argument is given on the command line."""
    return f"--{name.replace('_', '-')}"


def default_device() -> str:
    """Return the GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
