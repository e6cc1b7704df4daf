"""Runs Python in other processes: code, and scripts of this folder with Triton as on a GPU, not interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def python(*arguments: str, cwd: Path | None = None, timeout: float | None = None, **environment: str) -> str:
    """Return what Python prints, by its arguments and further variables; it may take so many seconds."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_script(name: str, *arguments: str, cache: Path) -> str:
    """Return what a script prints; ``cache`` is Triton's."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(FOLDER), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(FOLDER / name), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
