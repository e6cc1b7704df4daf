"""Where layers choose experts themselves, in place of vLLM's router."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from plugin_layers import create_experts, moe_layer
from vllm.config import get_current_vllm_config

from vllm_milo import compat
from vllm_milo.kernels import ops
from vllm_milo.models import routers

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_rank")]


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "runs_on_nvidia", lambda: True)


def plain_layer(method: str = "RenormalizeNaive", moe: dict | None = None, **options) -> SimpleNamespace:
    """What :func:`plain_router` reads of a layer."""
    config = {
        "routing_method": SimpleNamespace(name=method),
        "is_lora_enabled": False,
        "moe_parallel_config": SimpleNamespace(dp_size=1),
    }
    defaults = {"scoring_func": "softmax", "use_grouped_topk": False, "custom_routing_function": None}
    return SimpleNamespace(**defaults | options, moe_config=SimpleNamespace(**config | (moe or {})))


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(
    ("layer", "renormalizes"),
    [
        (plain_layer(), True),
        (plain_layer("Renormalize"), True),
        (plain_layer("Default"), False),
        (plain_layer("SigmoidRenorm"), None),
        (plain_layer("Simulated"), None),
        (plain_layer(scoring_func="sigmoid"), None),
        (plain_layer(use_grouped_topk=True), None),
        (plain_layer(custom_routing_function=min), None),
        (plain_layer(e_score_correction_bias=torch.zeros(4)), None),
        (plain_layer(hash_indices_table=torch.zeros(4)), None),
        (plain_layer(routed_scaling_factor=2.5), None),
        (plain_layer(moe={"is_lora_enabled": True}), None),
        (plain_layer(moe={"moe_parallel_config": SimpleNamespace(dp_size=2)}), None),
        (plain_layer(moe={"moe_parallel_config": SimpleNamespace(dp_size=1, pcp_size=2)}), None),
        (plain_layer(moe={"require_decomposed_backend": True}), None),
        (plain_layer(use_grouped_topk=None), None),
        (plain_layer(moe={"routing_method": None}), None),
    ],
)
def test_plain_routers_are_known(layer: SimpleNamespace, renormalizes: bool | None):
    assert routers.plain_router(layer) is renormalizes


@pytest.mark.usefixtures("on_a_gpu")
def test_who_asks_for_what_was_chosen_gets_it(monkeypatch: pytest.MonkeyPatch):
    config = SimpleNamespace(enable_return_routed_experts=True)
    monkeypatch.setattr(get_current_vllm_config(), "aux_output_config", config, raising=False)
    assert routers.plain_router(plain_layer()) is None


def test_vllm_chooses_where_asked_and_on_cpus(monkeypatch: pytest.MonkeyPatch):
    assert routers.plain_router(plain_layer()) is None
    monkeypatch.setattr(compat, "runs_on_nvidia", lambda: True)
    monkeypatch.setenv(routers.VARIABLE, "0")
    assert routers.plain_router(plain_layer()) is None


@pytest.mark.parametrize("renormalizes", [False, True])
def test_a_layer_hands_its_routers_logits_on(renormalizes: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vllm_milo.fused_moe.plain_router", lambda _: renormalizes)
    rows = torch.tensor([False, True, False])
    monkeypatch.setattr(compat, "padding_rows", lambda tokens: rows[:tokens])
    layer = moe_layer()
    method = create_experts(layer)
    assert method.is_monolithic
    method.backend, layer.expert_map = "torch", None
    monkeypatch.setattr(method, "_weights", lambda _: (["w13"], ["w2"]))
    monkeypatch.setattr(ops, "routed_moe", lambda *given: given)
    x, logits = torch.randn(3, 128), torch.randn(3, 4)
    given = method.apply_monolithic(layer, x, logits, input_ids=None)
    assert given[:2] == (x, logits)
    assert torch.equal(given[2], rows)
    assert given[3:] == (2, renormalizes, None, ["w13"], ["w2"], method.spec, "torch")


def test_vllm_says_which_rows_are_no_tokens(monkeypatch: pytest.MonkeyPatch):
    from vllm import envs, forward_context

    assert compat.padding_rows(3) is None
    rows = torch.tensor([False, False, False, True])
    monkeypatch.setattr(forward_context, "is_forward_context_available", lambda: True)
    monkeypatch.setattr(forward_context, "get_forward_context", lambda: SimpleNamespace(is_padding=rows))
    monkeypatch.setattr(envs, "VLLM_MOE_SKIP_PADDING", True, raising=False)
    assert torch.equal(compat.padding_rows(3), rows[:3])
    monkeypatch.setattr(envs, "VLLM_MOE_SKIP_PADDING", False)
    assert compat.padding_rows(3) is None
