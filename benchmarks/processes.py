"""Benchmarks that run parts of themselves in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks import ROOT

STOPPED = -1
"""Exit status of what took too long; below 0 as after a signal."""


def main_command(module: str, *words: str) -> list[str]:
    """Return the command that runs a module's ``main`` in any folder, and leaves its children's search path alone."""
    code = f"import sys; sys.path.append({str(ROOT)!r}); from {module} import main; main()"
    return [sys.executable, "-c", code, *words]


def run_main(
    module: str, *words: str, folder: Path, log: Path, environment: Mapping[str, str], seconds: float | None = None
) -> int:
    """Run a module's ``main`` in a process of its own, in ``folder``; return its exit status.

    Args:
        module: see :func:`main_command`.
        words: of its command line.
        folder: where it runs.
        log: a file for all that it prints.
        environment: its variables.
        seconds: after which it is stopped, which the log then says, and :data:`STOPPED` returned; None for never.
    """
    with log.open("w") as file:
        try:
            return subprocess.run(
                main_command(module, *words),
                env=dict(environment),
                cwd=folder,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            file.write(f"\nstopped after {seconds:.0f} s\n")
            return STOPPED
