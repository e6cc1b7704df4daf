"""Linear layers without a name: found by what stands beside them, or refused."""

from __future__ import annotations

import pytest
import torch
from plugin_layers import PREFIX, K, checkpoint_tensors, load, make_format
from random_layers import random_linear

from vllm_milo.checkpoint import CheckpointError
from vllm_milo.kernels import reference

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_rank")]


class Named(torch.nn.Module):
    """As vLLM's Attention: a module that knows its name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer_name = name


class Attention(torch.nn.Module):
    """As vLLM builds it for DeepSeek-MoE-16B; ``first`` puts what knows its name before the layers."""

    def __init__(self, fmt, beside: str | None = f"{PREFIX}.attn", first: bool = False) -> None:
        from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

        from vllm_milo.config import MiLoConfig

        super().__init__()
        options = {"bias": False, "quant_config": MiLoConfig(fmt), "params_dtype": torch.float32}
        if beside and first:
            self.attn = Named(beside)
        self.qkv_proj = QKVParallelLinear(K, 64, 8, 2, **options)
        self.o_proj = RowParallelLinear(512, 64, **options)
        if beside and not first:
            self.attn = Named(beside)


class Decoder(torch.nn.Module):
    def __init__(self, attention: torch.nn.Module) -> None:
        super().__init__()
        self.self_attn = attention


RANKS = {f"{PREFIX}.q_proj": 16, f"{PREFIX}.k_proj": 8, f"{PREFIX}.o_proj": 24}


@pytest.mark.parametrize("first", [False, True])
def test_name_is_that_of_the_neighbour(first: bool):
    layer = Attention(make_format(RANKS), first=first).qkv_proj
    assert layer.prefix == f"{PREFIX}.qkv_proj"
    weights, spec = random_linear([512, 128, 128], [16, 8, 0], K, 64, 3)
    load(layer, "qkv", checkpoint_tensors(weights, spec))
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(3, K)
    torch.testing.assert_close(layer.quant_method.apply(layer, x), reference.linear(x, weights, spec))


def test_every_layer_has_its_own_name():
    attention = Attention(make_format(RANKS))
    assert attention.o_proj.prefix == f"{PREFIX}.o_proj"
    assert attention.o_proj.quant_method.ranks == [24]
    assert attention.qkv_proj.quant_method.ranks == [16, 8, 0]


def test_layers_of_the_name_may_be_ignored():
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    fmt = make_format()
    attention = Attention(type(fmt)(ignore=(r"re:.*\.[qkv]_proj",)))
    assert isinstance(attention.qkv_proj.quant_method, UnquantizedLinearMethod)
    assert attention.qkv_proj.weight.shape == (768, K)
    assert not hasattr(attention.o_proj, "weight")


def test_name_may_come_from_further_up():
    attention = Attention(make_format(RANKS), beside=None)
    assert attention.qkv_proj.prefix == ""
    decoder = Decoder(attention)
    decoder.other = Named("model.layers.0.other")
    assert attention.qkv_proj.prefix == f"{PREFIX}.qkv_proj"
    assert attention.o_proj.quant_method.ranks == [24]


def test_layers_of_the_whole_model_are_named_too():
    """Beside the decoder's layers, where no name ends with the path to it: the path is the name."""
    from vllm.model_executor.layers.linear import ReplicatedLinear

    from vllm_milo.config import MiLoConfig

    model = Decoder(torch.nn.Module())
    config = MiLoConfig(make_format({"adapter.0": 8}))
    model.adapter = torch.nn.ModuleList([ReplicatedLinear(K, 64, bias=False, quant_config=config)])
    model.attn = Named("attn")
    assert model.adapter[0].prefix == ""
    model.model = Decoder(torch.nn.Module())
    model.model.layers = torch.nn.ModuleList([torch.nn.Module()])
    model.model.layers[0].attn = Named("model.layers.0.attn")
    model.lm_head = torch.nn.Module()
    assert model.adapter[0].prefix == "adapter.0"
    assert model.adapter[0].quant_method.ranks == [8]


def test_a_shared_expert_that_stands_twice_in_its_block():
    """As vLLM's Aria has it: beside the experts and in them, its layers called by the last part of a name alone."""
    from vllm.model_executor.layers.linear import ReplicatedLinear

    from vllm_milo.config import MiLoConfig

    config = MiLoConfig(make_format({"model.layers.0.mlp.shared.down_proj": 8}))
    block, experts, shared = torch.nn.Module(), Named("model.layers.0.mlp.experts"), torch.nn.Module()
    shared.down_proj = ReplicatedLinear(K, 64, bias=False, quant_config=config, prefix=".down_proj")
    block.shared = shared
    experts.shared = shared
    block.experts = experts
    assert shared.down_proj.prefix == "model.layers.0.mlp.shared.down_proj"
    assert shared.down_proj.quant_method.ranks == [8]


@pytest.mark.parametrize("beside", [None, "something.else", ".attn"])
def test_layer_without_a_named_neighbour_is_refused(beside: str | None):
    decoder = Decoder(Attention(make_format(RANKS), beside=beside))
    message = r"vLLM builds a QKVParallelLinear of Decoder without a name, and none is to be found"
    with pytest.raises(CheckpointError, match=message):
        torch.nn.ModuleList([decoder])


def test_layer_that_nothing_holds_is_refused_when_it_was_to_be_used():
    attention = Attention(make_format(RANKS), beside=None)
    for use in (attention.o_proj.quant_method.process_weights_after_loading, attention.o_proj):
        with pytest.raises(CheckpointError, match="builds a RowParallelLinear of its model without a name"):
            use(attention.o_proj if use is not attention.o_proj else torch.zeros(1, 512))
