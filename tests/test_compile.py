"""The kernels compile for GPUs that are not there: what the interpreter cannot tell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_for_gpu.py")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("capability", "which", "least"),
    [
        (90, "usual", 20),
        pytest.param(90, "all", 60, marks=pytest.mark.slow),
        pytest.param(80, "all", 50, marks=pytest.mark.slow),
        pytest.param(89, "all", 50, marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_launch_compiles_and_fits(capability: int, which: str, least: int, tmp_path: Path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, str(SCRIPT), str(capability), which]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= least
