"""The command ``milo``: the converter's subcommands, and ``milo tune``, which needs the kernels."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_milo.offline.cli import main as run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    from vllm_milo.command import tune

    return run(argv, [tune])
