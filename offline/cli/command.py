"""The command ``milo``: one module of this folder a subcommand; here are its parser, and how it ends."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

from vllm_milo.checkpoint import CheckpointError
from vllm_milo.shards import ShardError
from vllm_milo.values import one_line

from ..errors import ConversionError
from ..progress import recording
from . import evaluate, exchange, families, hub, inspect, quantize, stats, verify
from .summary import silence_stdout


class Subcommand(Protocol):
    """A module with a subcommand."""

    def add_parser(self, commands: Any) -> None:
        """Add the subcommand to the parser's ``commands``."""


def main(argv: Sequence[str] | None = None, further: Sequence[Subcommand] = ()) -> int:
    """Run the command line, with the subcommands of other packages that ``further`` holds; return the exit status.

    That is 0, or 1 for bad input, 130 after Ctrl-C, 143 after SIGTERM, 141 where nobody reads the output any more.
    What calls it with words of its own gets its handler of SIGTERM back, and may be any thread.
    """
    if threading.current_thread() is not threading.main_thread():  # which may set no handlers
        return _run(argv, further)
    before = signal.getsignal(signal.SIGTERM)
    try:
        return _run(argv, further, _terminate)
    finally:
        if argv is not None:
            signal.signal(signal.SIGTERM, before)


def _run(
    argv: Sequence[str] | None, further: Sequence[Subcommand], terminate: Callable[..., NoReturn] | None = None
) -> int:
    """Run the command line; ``terminate`` is what handles SIGTERM, None to leave that as it is."""
    name = "milo"
    try:
        if terminate is not None:
            signal.signal(signal.SIGTERM, terminate)
        if sys.stderr is None:  # closed by whoever started this
            sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        arguments = _parser(further).parse_args(argv)
        arguments.words = list(sys.argv[1:] if argv is None else argv)
        name = f"milo {arguments.command}"
        with recording(getattr(arguments, "log_json", None)):
            hub.run(arguments)
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:  # of `milo inspect OUT | head`
        silence_stdout()
        return 141
    except (ConversionError, CheckpointError, ShardError) as error:
        print("; ".join([f"{name}: error: {error}", *_notes(error)]), file=sys.stderr)
        return 1
    except PermissionError as error:
        where = error.filename if error.filename is not None else "a file"
        said = f"{name}: error: {where}: {error.strerror}; ask who owns it, or name another"
        print("; ".join([said, *_notes(error)]), file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            return _end_unforeseen(name, error)
        silence_stdout()
        print(f"{name}: error: what it prints finds no room: {error.strerror}", file=sys.stderr)
        return 1
    except Exception as error:
        return _end_unforeseen(name, error)
    except KeyboardInterrupt as error:
        if argv is None:  # the process ends with the command, whose end another Ctrl-C must not fill with tracebacks
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
        left = _notes(error) or ["nothing was left behind"]
        print("; ".join([f"{name}: interrupted", *left]), file=sys.stderr)
        return 143 if isinstance(error, _Terminated) else 130
    return 0


class _Terminated(KeyboardInterrupt):
    """What SIGTERM does to the command: the same as Ctrl-C, but for the exit status."""


def _terminate(*_: Any) -> NoReturn:
    raise _Terminated


def _notes(error: BaseException) -> list[str]:
    """Return what is added to an error: what it left behind, and how to go on.

    A second Ctrl-C takes effect while the first is handled, which has the notes then.
    """
    notes = list(getattr(error, "__notes__", ()))
    return notes if notes or error.__context__ is None else _notes(error.__context__)


def _end_unforeseen(name: str, error: Exception) -> int:
    """Say that nothing foresaw an exception, or raise it where the environment asks for that; return the status."""
    if "MILO_TRACEBACK" in os.environ:
        raise error
    said = f"{name}: error: {_unforeseen(error)}"
    print("; ".join([said, *_notes(error)]), file=sys.stderr)
    return 1


def _unforeseen(error: Exception) -> str:
    """Return what to say of an exception that nothing foresaw: its kind and its place in a line, no traceback."""
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if "/site-packages/" not in frame.filename]
    place = f"{places[-1].filename}:{places[-1].lineno}" if places else "?"
    return (
        f"{type(error).__name__}: {one_line(error)} ({place}); a bug of milo, or too little memory; "
        f"report what MILO_TRACEBACK=1 in the environment makes it show"
    )


class _Parser(argparse.ArgumentParser):
    """A parser, and its subcommands' parsers, whose errors are a line: the list of all options would hide it."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the command line, and end with status 2."""
        self.exit(2, f"{self.prog}: error: {message}; `{self.prog} --help` tells all\n")


def _parser(further: Sequence[Subcommand]) -> argparse.ArgumentParser:
    parser = _Parser(prog="milo", description="3-bit MoE checkpoints with low-rank compensators, for vLLM.")
    commands = parser.add_subparsers(dest="command", required=True)
    for subcommand in (quantize, exchange, inspect, verify, evaluate, stats, families, *further):
        subcommand.add_parser(commands)
    return parser
