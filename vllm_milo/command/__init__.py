"""The command ``milo``: the converter's subcommands, and ``milo tune``, which needs the kernels."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    try:  # torch takes seconds
        from vllm_milo.command import tune
        from vllm_milo.offline.cli import main as run
    except KeyboardInterrupt:
        print("milo: interrupted; nothing was left behind", file=sys.stderr)
        return 130
    return run(argv, [tune])
