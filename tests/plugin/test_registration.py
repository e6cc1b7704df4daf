"""vLLM finds the plugin."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest
from scripts import python


def test_entry_point_is_found_and_imports_nothing():
    code = (
        "import sys; from importlib.metadata import entry_points\n"
        "(point,) = entry_points(group='vllm.general_plugins', name='milo')\n"
        "point.load(); print({'torch', 'transformers', 'triton', 'vllm'} & sys.modules.keys())\n"
    )
    assert python("-c", code, timeout=120).strip() == "set()"


@pytest.mark.vllm
def test_registering_twice_gives_vllm_the_method():
    from vllm.model_executor.layers.quantization import get_quantization_config

    (point,) = entry_points(group="vllm.general_plugins", name="milo")
    register = point.load()
    register()
    register()
    assert get_quantization_config("milo").__name__ == "MiLoConfig"


@pytest.mark.vllm
def test_registering_needs_no_triton():
    """vLLM registers plugins in every process, whatever it serves; its CPU builds may come without Triton."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import vllm_milo; vllm_milo.register()\n"
        "print([name for name in sys.modules if name.startswith('vllm_milo.kernels')])\n"
    )
    assert python("-c", code, timeout=120).splitlines()[-1] == "[]"
