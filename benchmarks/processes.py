"""Benchmarks that run parts of themselves in processes of their own."""

from __future__ import annotations

import sys

from benchmarks import ROOT


def main_command(module: str, *words: str) -> list[str]:
    """Return the command that runs a module's ``main`` in any folder, and leaves its children's search path alone."""
    code = f"import sys; sys.path.append({str(ROOT)!r}); from {module} import main; main()"
    return [sys.executable, "-c", code, *words]
