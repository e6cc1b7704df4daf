"""Arguments that several subcommands share, and how a checkpoint's card tells them."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

import torch

from ..checkpoint.card import OUT
from ..errors import ConversionError
from ..planning.devices import find_device
from .hub import model_place, path

DTYPES = ("float32", "bfloat16", "float16")
"""Names of the dtypes that a model can be run in."""
OR_HUB = "or org/name or org/name@revision of the Hugging Face Hub"
HEAD_HELP = """8 or 4 store the output head (lm_head) as integers with scales, 16 (default) as it is. The bits a weight
do not count it; vLLM's own weight-only kernels serve it. Refused where it is tied to the embeddings."""
SERVING_HELP = """the most that compensators may cost a decoded token over what its codes cost it, by measured costs of
bytes that it reads, as in 0.3; bounds ranks that a budget shares. Default: the preset's,
with its own budget"""
MOST = 10**9
"""Of what options count: windows, steps, rounds."""
NOT_SAID = ("--resume", "--overwrite", "--quiet", "--delete-source-shards")
"""Options that do not decide the result."""
NOT_SAID_VALUE = "--log-json"
"""One with a value."""


def add_text_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Add what every subcommand takes that runs a model on a text."""
    parser.add_argument("model", type=model_place, help=f"folder of a source model or MiLo checkpoint, {OR_HUB}")
    number = {"nargs": "+"} if several else {}
    parser.add_argument("--text", type=path, required=True, help="UTF-8 text file", **number)  # type: ignore[arg-type]
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
            raise ConversionError(f"{text}: cannot be read as UTF-8 text: No such file or directory; name a text file")


def check_number(name: str, value: int | None, least: int) -> None:
    """Refuse the number of an option that is smaller than ``least``, or larger than any that does anything.

    Raises:
        ConversionError: names the option.
    """
    if value is not None and value < least:
        raise ConversionError(f"{_option(name)} must be at least {least}")
    if value is not None and value > MOST:
        raise ConversionError(f"{_option(name)} must be at most {MOST}")


def check_share(share: float | None, shared: bool) -> None:
    """Refuse a serving share that is no number above 0, or where ranks are not shared within a budget.

    Raises:
        ConversionError: names the option.
    """
    if share is not None and not 0 < share < float("inf"):
        raise ConversionError(f"--serving-share {share:g}: must be a number above 0, such as 0.3")
    if share is not None and not shared:
        raise ConversionError(
            f"--serving-share {share:g}: bounds ranks that a budget shares; drop --ranks, or give --budget-bits"
        )


def _option(name: str) -> str:
    """Return how a parsed argument is given on the command line."""
    return f"--{name.replace('_', '-')}"


def default_device() -> str:
    """Return the GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def command_of(arguments: argparse.Namespace) -> str:
    """Return the command line that was parsed; of each path only the last name, and OUT for the output.

    Empty where there was none.
    """
    words = getattr(arguments, "words", None)
    if not words:
        return ""
    return shlex.join(["milo", *(_without_folder(word, arguments.output) for word in _deciding(words))])


def _deciding(words: list[str]) -> list[str]:
    """Return the words without options that do not decide the result."""
    kept = [word for word in words if word not in NOT_SAID and not word.startswith(f"{NOT_SAID_VALUE}=")]
    if NOT_SAID_VALUE in kept:
        place = kept.index(NOT_SAID_VALUE)
        del kept[place : place + 2]
    return kept


def _without_folder(word: str, output: Path) -> str:
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    if value and Path(value) == output:
        return option + equals + OUT
    is_path = value.startswith(("/", ".", "~")) or (os.sep in value and Path(value).exists())
    return option + equals + (Path(value).name if is_path else value)
