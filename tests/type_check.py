"""Runs mypy on the packages under the names they are installed by: ``python tests/type_check.py``.

``kernels/`` and ``offline/`` are mapped into ``vllm_milo`` by setuptools, which mypy cannot see; a tree of links
shows it the installed shape.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Check all packages and the benchmarks; return mypy's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "vllm_milo"
        package.mkdir()
        for path in (ROOT / "vllm_milo").iterdir():
            if path.name != "__pycache__":
                (package / path.name).symlink_to(path)
        for name in ("kernels", "offline"):
            (package / name).symlink_to(ROOT / name)
        (Path(folder) / "benchmarks").symlink_to(ROOT / "benchmarks")
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
        command += ["-p", "vllm_milo", "-p", "benchmarks"]
        return subprocess.run(command, env=os.environ | {"MYPYPATH": folder}, cwd=folder, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
