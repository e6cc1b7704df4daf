"""Makes MiLo known to transformers when transformers imports its quantizers, and imports nothing before.

``import vllm_milo`` runs in every process of vLLM, and in scripts before or after transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_QUANTIZERS = "transformers.quantizers"


def register_in_transformers() -> None:
    """Register MiLo's quantizer in transformers: now where its quantizers are there, else as soon as they are."""
    if _QUANTIZERS in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Watch())


def _register() -> None:
    from vllm_milo.huggingface import quantizer  # noqa: F401  # registers itself, once a process


class _Watch(MetaPathFinder):
    """Finds transformers' quantizers as Python does, and registers MiLo's after they have been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return where the quantizers are; None, which leaves it to others, for any other module."""
        if fullname != _QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
