"""Where routers' gates are multiplied by the plugin's kernel, in place of the library's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from plugin_layers import make_format
from vllm.config import get_current_vllm_config
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod

from vllm_milo import compat
from vllm_milo.config import MiLoConfig
from vllm_milo.kernels import ops
from vllm_milo.models import gates

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_rank")]
NAME = "model.layers.0.mlp.gate"


@pytest.fixture
def made_for(monkeypatch: pytest.MonkeyPatch) -> MiLoConfig:
    """The configuration of a model whose first layer was made, so that gates are watched from now on."""
    config = MiLoConfig(make_format())
    monkeypatch.setattr(get_current_vllm_config(), "quant_config", config)
    monkeypatch.setattr(get_current_vllm_config(), "additional_config", {})
    monkeypatch.setattr(gates, "_is_streamed", lambda weight: True)
    monkeypatch.setattr(compat, "runs_on_nvidia", lambda: True)
    monkeypatch.delenv(gates.VARIABLE, raising=False)
    config.get_quant_method(ReplicatedLinear(64, 64, quant_config=config, prefix=NAME), NAME)
    return config


@pytest.fixture(autouse=True)
def unwatched() -> None:
    """Other tests' gates are vLLM's."""
    yield
    op_registry_oot.pop(GateLinear.__name__, None)


def make_gate(config: MiLoConfig | None, **options) -> torch.nn.Module:
    gate = GateLinear(64, 6, quant_config=config, prefix=NAME, params_dtype=torch.float32, **options)
    torch.nn.init.normal_(gate.weight)
    return gate


@pytest.mark.parametrize("told", [False, True], ids=["asked", "not asked"])
@pytest.mark.parametrize("bias", [False, True])
def test_gates_are_taken_whether_or_not_a_model_asks_for_their_method(told: bool, bias: bool, made_for: MiLoConfig):
    gate = make_gate(None if told else made_for, bias=bias)
    assert isinstance(gate.quant_method, gates.GateMethod)
    assert gate.is_unquantized, "as vLLM says it, who chooses kernels by it"
    gate.quant_method.process_weights_after_loading(gate)
    x = torch.randn(5, 64)
    if bias:
        torch.nn.init.normal_(gate.bias)
    found = gate(x)
    torch.testing.assert_close(found[0], torch.nn.functional.linear(x, gate.weight, gate.bias))
    assert compat.graph_notes() == {gates.NOTE: 1}


def test_the_product_is_the_operators(made_for: MiLoConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ops, "wide_linear", lambda x, weights, bias, backend: (x, weights, bias, backend))
    gate = make_gate(made_for)
    x = torch.randn(32, 64)
    assert gate.quant_method.apply(gate, x) == (x, [gate.weight], None, "torch")
    more = torch.randn(33, 64)
    found = gate.quant_method.apply(gate, more)
    torch.testing.assert_close(found, torch.nn.functional.linear(more, gate.weight))


@pytest.mark.usefixtures("made_for")
def test_other_models_gates_are_vllms(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(get_current_vllm_config(), "quant_config", None)
    assert type(make_gate(None).quant_method) is UnquantizedLinearMethod


@pytest.mark.parametrize(("name", "found"), [("runs_on_nvidia", False), ("is_batch_invariant", True)])
def test_gates_are_vllms_elsewhere(name: str, found: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(gates.VARIABLE, raising=False)
    monkeypatch.setattr(compat, "runs_on_nvidia", lambda: True)
    monkeypatch.setattr(compat, name, lambda: found)
    gates.watch_gates()
    assert GateLinear.__name__ not in op_registry_oot


@pytest.mark.parametrize(("value", "watched"), [(None, True), ("1", True), ("0", False)])
def test_gates_are_vllms_where_that_is_asked(value: str | None, watched: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compat, "runs_on_nvidia", lambda: True)
    monkeypatch.delenv(gates.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(gates.VARIABLE, value)
    gates.watch_gates()
    assert (GateLinear.__name__ in op_registry_oot) == watched


def test_vllm_says_whether_batches_may_show(monkeypatch: pytest.MonkeyPatch):
    from vllm import envs

    assert not compat.is_batch_invariant()
    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    assert compat.is_batch_invariant()


def test_gates_are_vllms_where_their_logits_are_of_more_bits(made_for: MiLoConfig):
    assert type(make_gate(made_for, out_dtype=torch.bfloat16).quant_method) is UnquantizedLinearMethod
    assert isinstance(make_gate(made_for, out_dtype=torch.float32).quant_method, gates.GateMethod), "as the weights"


def test_gates_are_vllms_where_nothing_tells_graphs_apart(made_for: MiLoConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compat, "graph_notes", lambda: None)
    assert type(make_gate(made_for).quant_method) is UnquantizedLinearMethod


def test_gates_of_16_bits_are_streamed_on_gpus_alone(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple] = []
    monkeypatch.setattr(ops, "streams", lambda *given: bool(asked.append(given)) or given[0] < 99)
    monkeypatch.setattr(ops, "choose_backend", lambda *_: "triton")
    gpu = torch.device("cuda")

    def weight(rows: int, dtype: torch.dtype = torch.bfloat16, device: torch.device = gpu) -> SimpleNamespace:
        return SimpleNamespace(shape=(rows, 64), dtype=dtype, device=device)

    assert gates._is_streamed(weight(8))
    assert not gates._is_streamed(weight(99))
    assert asked == [(8, 64, gpu), (99, 64, gpu)]
    assert not gates._is_streamed(weight(8, torch.float32))
    assert not gates._is_streamed(weight(8, device=torch.device("cpu")))
    monkeypatch.setattr(ops, "choose_backend", lambda *_: "torch")
    assert not gates._is_streamed(weight(8))


def test_another_plugins_gates_stay(made_for: MiLoConfig):
    """vLLM lets one plugin replace a layer."""
    op_registry_oot.pop(GateLinear.__name__)

    @GateLinear.register_oot
    class Theirs(GateLinear):
        pass

    compat.watch_gates(lambda gate: pytest.fail("it is not ours"))
    assert type(make_gate(made_for)) is Theirs
