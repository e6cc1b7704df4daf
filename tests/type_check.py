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
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "vllm_milo"]
        environment = os.environ | {"MYPYPATH": f"{folder}:{ROOT / 'benchmarks'}"}
        packages = subprocess.run(command, env=environment, cwd=folder, check=False).returncode
        files = [str(path) for path in sorted((ROOT / "benchmarks").glob("*.py"))]
        benchmarks = subprocess.run([*command[:-2], *files], env=environment, cwd=folder, check=False).returncode
        return packages or benchmarks


if __name__ == "__main__":
    sys.exit(main())
