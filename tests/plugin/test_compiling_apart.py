"""Which loads have their kernels compiled in other processes: those that quantize meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plugin_layers import PREFIX, create_experts, make_format, make_layer, moe_layer

from vllm_milo.kernels import warm_up
from vllm_milo.offline.presets import milo_recipe

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_rank")]


@pytest.mark.parametrize(
    ("online", "dummy", "expected"), [(False, False, False), (True, False, True), (True, True, False)]
)
def test_layers_that_are_quantized_have_kernels_compiled_apart(
    online: bool, dummy: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
):
    from vllm_milo import compat, fused_moe, linear
    from vllm_milo.online.gathering import Gathering

    found: list[Any] = []
    for module, name in ((linear, "start_linear"), (fused_moe, "start_experts")):
        monkeypatch.setattr(module, name, lambda *arguments: found.append(arguments[-1]) or [])
    monkeypatch.setattr(compat, "loads_dummy_weights", lambda: dummy)
    gathering = Gathering(milo_recipe(False)) if online else None
    make_layer("row", make_format({f"{PREFIX}.o_proj": 8}), [128], f"{PREFIX}.o_proj", gathering=gathering)
    create_experts(moe_layer(), gathering=gathering)
    assert found == [expected, expected]


@pytest.mark.parametrize("apart", [False, True])
def test_the_first_layer_on_a_gpu_makes_the_compiler(apart: bool, monkeypatch: pytest.MonkeyPatch):
    from vllm_milo.loading import ahead

    monkeypatch.setattr(warm_up, "_compiler", None)
    monkeypatch.setattr(ahead.ops, "choose_backend", lambda operator, device: "triton")
    assert not ahead._compiles("linear", torch.device("cpu"), apart)
    assert warm_up._compiler is None
    assert ahead._compiles("linear", torch.device("cuda"), apart)
    assert (warm_up._compiler._helpers is not None) == apart
