"""The command ``milo``: one module of this folder a subcommand; here are its parser, and how it ends."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from vllm_milo.checkpoint import CheckpointError
from vllm_milo.shards import ShardError
from vllm_milo.values import one_line

from ..errors import ConversionError
from . import evaluate, inspect, quantize, stats, verify


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status (0, 1 for bad input, 130 when interrupted)."""
    signal.signal(signal.SIGTERM, _interrupt)
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ConversionError, CheckpointError, ShardError) as error:
        print(f"milo {arguments.command}: error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if "MILO_TRACEBACK" in os.environ:
            raise
        print(f"milo {arguments.command}: error: {_unforeseen(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"milo {arguments.command}: interrupted; nothing was left behind", file=sys.stderr)
        return 130
    return 0


def _unforeseen(error: Exception) -> str:
    """Return what to say of an exception that nothing foresaw: its kind and its place in a line, no traceback."""
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if "/site-packages/" not in frame.filename]
    place = f"{places[-1].filename}:{places[-1].lineno}" if places else "?"
    return (
        f"{type(error).__name__}: {one_line(error)} ({place}); a bug of milo, or too little memory; "
        f"report what MILO_TRACEBACK=1 in the environment makes it show"
    )


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="milo", description="3-bit MoE checkpoints with low-rank compensators, for vLLM."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for subcommand in (quantize, inspect, verify, evaluate, stats):
        subcommand.add_parser(commands)
    return parser
