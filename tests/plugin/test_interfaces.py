"""What the plugin uses of vLLM: where a newer version lacks or changes something, one line says what."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm
PLUGIN = Path(__file__).parents[2] / "vllm_milo"
OPTIONAL = {
    "vllm.model_executor.layers.fused_moe.cpu_fused_moe.select_experts",  # where there is no router for CPUs
}
"""What the plugin asks for only where this version has it."""


def used_of_vllm() -> Iterator[tuple[str, str]]:
    """Modules of vLLM that the plugin imports from, and what."""
    for path in sorted(PLUGIN.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                for name in node.names:
                    yield str(node.module), name.name


def has(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name)
    except ImportError:
        return False


def test_all_that_is_imported_is_there():
    import vllm

    used = set(used_of_vllm())
    assert len(used) > 15
    missing = sorted(f"{module}.{name}" for module, name in used if not has(module, name))
    missing = [name for name in missing if name not in OPTIONAL]
    assert not missing, f"vLLM {vllm.__version__} lacks what the plugin imports: {', '.join(missing)}"


def accepts(mine: inspect.Signature, theirs: inspect.Signature) -> list[str]:
    """Parameters of vLLM's method that ours would not take, by position or by name."""
    kinds = {parameter.kind for parameter in mine.parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return []
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        name
        for name, parameter in theirs.parameters.items()
        if name not in mine.parameters
        and parameter.kind not in variable
        and not (parameter.default is not inspect.Parameter.empty and inspect.Parameter.VAR_POSITIONAL in kinds)
    ]


def test_methods_take_what_vllm_passes():
    """Of each class that stands in for one of vLLM's, those that vLLM has too."""
    import vllm
    from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
    from vllm.model_executor.layers.linear import LinearMethodBase
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    from vllm_milo.config import MiLoConfig
    from vllm_milo.fused_moe import MiLoMoEMethod
    from vllm_milo.linear import MiLoLinearMethod

    assert accepts(inspect.signature(lambda a: a), inspect.signature(lambda a, b: b)) == ["b"]
    checked, wrong = 0, []
    for mine, base in (
        (MiLoConfig, QuantizationConfig),
        (MiLoMoEMethod, FusedMoEMethodBase),
        (MiLoLinearMethod, LinearMethodBase),
    ):
        for name, method in vars(mine).items():
            theirs = getattr(base, name, None)
            if name.startswith("_") or not inspect.isfunction(method) or not inspect.isfunction(theirs):
                continue
            checked += 1
            lacking = accepts(inspect.signature(method), inspect.signature(theirs))
            wrong += [f"{mine.__name__}.{name} takes no {parameter}" for parameter in lacking]
        missing = sorted(getattr(mine, "__abstractmethods__", ()))
        wrong += [f"{mine.__name__} lacks {name}" for name in missing]
    assert checked >= 10
    assert not wrong, f"vLLM {vllm.__version__} passes more than the plugin takes: {'; '.join(wrong)}"
