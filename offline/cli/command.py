"""The command ``milo``: one module of this folder a subcommand; here are its parser, and how it ends."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from vllm_milo.checkpoint import CheckpointError
from vllm_milo.shards import ShardError

from ..errors import ConversionError
from . import evaluate, hub, inspect, quantize, stats, verify


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status (0, 1 for bad input, 130 when interrupted)."""
    signal.signal(signal.SIGTERM, _interrupt)
    arguments = _parser().parse_args(argv)
    arguments.words = list(sys.argv[1:] if argv is None else argv)
    try:
        hub.run(arguments)
    except (ConversionError, CheckpointError, ShardError) as error:
        print(f"milo {arguments.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"milo {arguments.command}: interrupted; nothing was left behind", file=sys.stderr)
        return 130
    return 0


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
