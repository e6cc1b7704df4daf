"""Layers of experts inside vLLM but without an engine: refusals, and a choice that torch.compile can trace."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from plugin_layers import EXPERTS, create_experts, moe_layer

from vllm_milo.checkpoint import CheckpointError, GroupTable, MiLoFormat, RankTable

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_rank")]


@pytest.mark.parametrize(
    ("layer", "moe", "message"),
    [
        ({}, {"is_act_and_mul": False}, "experts without a gate and the activation 'silu'"),
        ({"activation": SimpleNamespace(value="relu2_no_mul")}, {}, "experts with a gate and the activation 'relu2_no"),
        ({}, {"is_lora_enabled": True}, "LoRA on experts; .* --lora-target-modules q_proj"),
        ({"activation": SimpleNamespace(value="relu2")}, {}, "the activation 'relu2'"),
        ({"swiglu_limit": 0.0}, {}, r"silu with swiglu_limit 0\.0"),
        ({"swiglu_alpha": 1.702, "swiglu_beta": 1.0}, {}, r"swiglu_alpha 1\.702, swiglu_beta 1\.0"),
        ({"swiglu_limit": 7.0}, {"swiglu_beta": 1.0}, r"swiglu_limit 7\.0, swiglu_beta 1\.0"),
        ({"activation": SimpleNamespace(value="gelu"), "swiglu_limit": 7.0}, {}, "gelu with swiglu_limit"),
        ({"activation": SimpleNamespace(value="swigluoai"), "swiglu_limit": 5.0}, {}, "swigluoai with swiglu_limit 5"),
        ({"activation": SimpleNamespace(value="swigluoai_uninterleave")}, {}, "with no swiglu_limit"),
        ({"activation": SimpleNamespace(value="swiglustep"), "swiglu_limit": 16.0}, {}, "swiglustep with swiglu_limit"),
    ],
)
def test_unsupported_experts_are_refused(layer, moe, message):
    with pytest.raises(CheckpointError, match=rf"model\.layers\.0\.mlp\.experts: MiLo does not support .*{message}"):
        create_experts(moe_layer(**layer), **moe)


COMPUTED = {
    "silu": ("silu", 0.0, 1.0, 0.0),
    "gelu": ("gelu", 0.0, 1.0, 0.0),
    "gelu_tanh": ("gelu_tanh", 0.0, 1.0, 0.0),
    "swigluoai": ("silu", 7.0, 1.702, 1.0),
    "swiglustep": ("swiglustep", 7.0, 1.0, 0.0),
    "relu2_no_mul": ("relu2_no_mul", 0.0, 1.0, 0.0),
}
"""What the kernels get of vLLM's activations."""


def test_every_activation_of_vllm_is_computed_or_refused():
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    assert COMPUTED.keys() <= {activation.value for activation in MoEActivation}
    for activation in MoEActivation:
        layer, name = moe_layer(activation=activation), activation.value
        if name in COMPUTED:
            spec = create_experts(layer, is_act_and_mul=activation.is_gated).spec
            assert (spec.activation, spec.limit, spec.alpha, spec.beta) == COMPUTED[name]
            continue
        with pytest.raises(CheckpointError, match=r"does not support (a clamped|the activation)"):
            create_experts(layer, is_act_and_mul=activation.is_gated)


@pytest.mark.parametrize("owner", ["layer", "description"])
def test_constants_of_the_activation_reach_the_kernels(owner: str):
    def spec_of(name: str, **constants: float) -> tuple:
        on_layer = constants if owner == "layer" else {}
        layer = moe_layer(activation=SimpleNamespace(value=name), **on_layer)
        return create_experts(layer, **({} if on_layer else constants)).spec[4:]

    assert spec_of("silu", swiglu_limit=10.0) == (10.0, 1.0, 0.0)
    assert spec_of("swigluoai_uninterleave", swiglu_limit=7.0) == (7.0, 1.0, 0.0)
    assert spec_of("swigluoai_uninterleave", swiglu_limit=7.0, swiglu_alpha=1.702, swiglu_beta=1.0) == (7.0, 1.702, 1.0)


def test_experts_without_a_gate_have_two_matrices():
    layer = moe_layer(activation=SimpleNamespace(value="relu2_no_mul"))
    method = create_experts(layer, is_act_and_mul=False)
    assert layer.w13_weight_packed.shape == (4, 128, 12)
    assert not method.spec.is_gated
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.0\.mlp\.experts\.0\.up_proj\.weight_packed"):
        method.process_weights_after_loading(layer)


def test_biases_of_gate_and_up_are_taken_apart():
    layer = moe_layer(activation=SimpleNamespace(value="swigluoai"))
    method = create_experts(layer, has_bias=True)
    up_first = torch.arange(4 * 256).view(4, 256).float()
    layer.w13_bias.data.copy_(up_first)
    found = method._take_bias(layer, method.gemms[0])
    assert torch.equal(found[:, :128], up_first[:, ::2])
    assert torch.equal(found[:, 128:], up_first[:, 1::2])


def test_biases_that_vllm_did_not_load_are_refused():
    layer = moe_layer()
    method = create_experts(layer, has_bias=True)
    layer.w13_bias.data[:3] = 0
    with pytest.raises(CheckpointError, match="w13_bias was not loaded for all experts"):
        method._take_bias(layer, method.gemms[0])


@pytest.mark.parametrize("on_input", [True, False])
def test_routers_weight_may_be_on_the_input(on_input: bool):
    assert create_experts(moe_layer(apply_router_weight_on_input=on_input)).spec.router_weight_on_input is on_input


@pytest.mark.parametrize("routes", [True, False])
def test_routing_choice_can_be_traced(routes: bool, monkeypatch: pytest.MonkeyPatch):
    """torch.compile traces reads of is_monolithic, but cannot trace the search for vLLM's router."""
    from vllm_milo import compat

    monkeypatch.setattr(compat, "routes_inside_method", lambda: routes)
    method = create_experts(moe_layer())
    monkeypatch.undo()
    compiled = torch.compile(lambda x: x + method.is_monolithic, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)).item() == routes


def test_expert_split_that_cuts_a_group_is_refused():
    with pytest.raises(CheckpointError, match=r"tensor parallel size 2 leaves .* 96, .* --enable-expert-parallel"):
        create_experts(moe_layer(tp_size=2), intermediate=96)


def test_the_group_size_of_experts_without_a_gate_is_that_of_up():
    layer = moe_layer(activation=SimpleNamespace(value="relu2_no_mul"))
    groups = GroupTable({}, {EXPERTS: {"up_proj": 64}})
    create_experts(layer, MiLoFormat(128, groups=groups), is_act_and_mul=False, intermediate=256)
    assert (layer.w13_weight_scale.shape, layer.w2_weight_scale.shape) == ((4, 256, 2), (4, 128, 2))


@pytest.mark.parametrize(
    ("sizes", "w13", "w2"),
    [({}, 128, 128), ({"down_proj": 64}, 128, 64), ({"w1": 64, "w3": 64}, 64, 128), ({"w1": 32, "w3": 32}, 32, 128)],
)
def test_gate_up_and_down_may_differ_in_group_size(sizes: dict[str, int], w13: int, w2: int):
    layer = moe_layer()
    method = create_experts(layer, MiLoFormat(128, groups=GroupTable({}, {EXPERTS: sizes})), intermediate=256)
    assert layer.w13_weight_scale.shape == layer.w13_weight_zero.shape == (4, 512, 128 // w13)
    assert layer.w2_weight_scale.shape == layer.w2_weight_zero.shape == (4, 128, 256 // w2)
    expected = dict(method._expected_pieces())
    assert expected[f"{EXPERTS}.3.w3.weight_scale"] == ("F16", (256, 128 // w13))
    assert expected[f"{EXPERTS}.0.w2.weight_zero"] == ("F16", (128, 256 // w2))


def test_expert_splits_are_checked_against_the_gemms_own_groups():
    """The down projection's 384 inputs on two ranks: three groups of 64 each, but one and a half of 128."""
    with pytest.raises(CheckpointError, match=r"w2: tensor parallel size 2 leaves input size 192, .* multiple of 128"):
        create_experts(moe_layer(tp_size=2), MiLoFormat(128), intermediate=192)
    fmt = MiLoFormat(128, groups=GroupTable({}, {EXPERTS: {"w2": 64}}))
    create_experts(moe_layer(tp_size=2), fmt, intermediate=192)


def test_rank_list_of_another_length_is_refused():
    fmt = MiLoFormat(ranks=RankTable(0, {}, {"model.layers.0.mlp.experts": {"up_proj": [8, 16]}}))
    with pytest.raises(CheckpointError, match=r"lists 2 ranks, but .* has 4 experts"):
        create_experts(moe_layer(), fmt)


def test_missing_expert_tensors_are_named():
    layer = moe_layer()
    method = create_experts(layer)
    with pytest.raises(
        CheckpointError, match=r"lacks model\.layers\.0\.mlp\.experts\.0\.w1\.weight_packed I32 \[128, 12\]"
    ):
        method.process_weights_after_loading(layer)


def test_extra_expert_factor_is_named():
    layer = moe_layer()
    create_experts(layer, MiLoFormat())
    parameter = layer.w13_weight_u
    with pytest.raises(CheckpointError, match=r"experts\.2\.w3\.weight_u is extra"):
        parameter.weight_loader(parameter, torch.zeros(8, 12, dtype=torch.int32), "w13_weight_u", "w3", 2)


def test_rank_offsets_are_worked_out_once():
    """Every factor tensor of a load asks for them: with 256 experts, 3072 times."""
    from vllm_milo.models.local_experts import Gemm

    gemm = Gemm("w13", 128, 64, 64, [[8, 16], [0, 24]], ("w1", "w3"))
    assert gemm.rank_offsets == [0, 8, 24, 24, 48]
    assert gemm.rank_offsets is gemm.rank_offsets
