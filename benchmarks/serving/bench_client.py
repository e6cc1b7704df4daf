"""``vllm bench serve`` within this process: its start takes longer than a short measurement."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any


def bench_serve(words: Sequence[str]) -> dict[str, Any]:
    """Return what ``vllm bench serve`` measures with the words of a command line; what it prints is kept back.

    Raises:
        RuntimeError: it ended with an error; the message has the end of what it printed.
    """
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(description=__doc__)
    add_cli_args(parser)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            return main(parser.parse_args(list(words)))
        except (Exception, SystemExit) as error:
            raise RuntimeError(f"vllm bench serve: {error!r}\n{printed.getvalue()[-2000:]}") from error
