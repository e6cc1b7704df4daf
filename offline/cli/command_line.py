"""The command that made a checkpoint, as its card tells it: without the paths of the machine that it ran on."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from ..checkpoint.card import OUT

NOT_SAID = ("--resume", "--overwrite", "--quiet", "--delete-source-shards")
"""Options that do not decide the result."""
NOT_SAID_VALUE = "--log-json"
"""One with a value."""


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
