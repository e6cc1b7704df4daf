"""What compiles the kernels of layers that vLLM makes."""

from __future__ import annotations

import pytest
import torch

from vllm_milo.kernels import warm_up

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_rank")]


def test_the_first_layer_on_a_gpu_makes_the_compiler(monkeypatch: pytest.MonkeyPatch):
    from vllm_milo import compat
    from vllm_milo.loading import ahead

    monkeypatch.setattr(warm_up, "_compiler", None)
    monkeypatch.setattr(compat, "place_on_host", lambda: (1, 2))
    monkeypatch.setattr(ahead.ops, "choose_backend", lambda operator, device: "triton")
    assert not ahead._compiles("linear", torch.device("cpu"))
    assert warm_up._compiler is None
    assert ahead._compiles("linear", torch.device("cuda"))
    assert warm_up._compiler.share == (1, 2)
