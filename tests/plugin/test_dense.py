"""Which dense layers a server keeps in 16 bits."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from plugin_layers import PREFIX, K, checkpoint_tensors, load, make_format, make_layer
from random_layers import random_linear, relative_error

from vllm_milo import compat
from vllm_milo.kernels import ops, reference
from vllm_milo.kernels.serving.dense.codes import code_bytes
from vllm_milo.kernels.weights import LinearWeights
from vllm_milo.loading import account, dense

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_rank")]
GPU = torch.device("cuda:0")
TOTAL = 10_400


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> dict:
    """vLLM's configuration for plugins, on a GPU of :data:`TOTAL` bytes that is empty."""
    notes: dict = {"other plugin's": 1}
    monkeypatch.setattr(compat, "graph_notes", lambda: notes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=TOTAL))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    monkeypatch.setattr(dense.ops, "streams", lambda outputs, inputs, device, in_codes: in_codes and outputs < 10**6)
    monkeypatch.delenv(dense.VARIABLE, raising=False)
    return notes


def test_layers_are_kept_while_they_are_few_of_the_devices_bytes(notes: dict):
    places = [dense.reserve(f"layer {i}", 7, 10, GPU, torch.bfloat16) for i in range(4)]
    assert [place is not None and place.in_codes for place in places] == [True, True, False, False]
    small = dense.reserve("small", 5, 4, GPU, torch.bfloat16)
    assert small is not None
    assert not small.in_codes, "there is room for 16 bits alone"
    assert notes == {"other plugin's": 1, dense.NOTE: {"layer 0": 238, "layer 1": 238, "small": 40}}
    assert json.loads(json.dumps(notes)) == notes


def test_none_is_kept_where_weights_fill_the_device(notes: dict, monkeypatch: pytest.MonkeyPatch):
    first, second = (dense.reserve(name, 7, 10, GPU, torch.bfloat16) for name in ("first", "second"))
    assert first is not None
    assert second is not None
    assert first.keep(GPU)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0.61 * TOTAL)
    assert not second.keep(GPU)
    assert first.keep(GPU), "a layer that is loaded once more stays what it was"
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    assert not second.keep(GPU)
    assert notes[dense.NOTE] == {"first": 238}


@pytest.mark.parametrize(
    ("device", "dtype"), [(GPU, torch.float32), (torch.device("cpu"), torch.bfloat16), (torch.device("meta"), None)]
)
def test_none_is_kept_where_no_kernel_of_triton_would_run(device: torch.device, dtype, notes: dict):
    assert dense.reserve("layer", 1, 1, device, dtype or torch.bfloat16) is None
    assert dense.NOTE not in notes


def test_the_variable_decides(notes: dict, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(dense.VARIABLE, "16bit")
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: TOTAL)
    place = dense.reserve("large", 10, TOTAL, torch.device("cpu"), torch.float32)
    assert place is not None
    assert place.keep(torch.device("cpu"))
    assert not place.in_codes
    monkeypatch.setenv(dense.VARIABLE, "8bit")
    for device, in_codes in ((torch.device("cpu"), False), (GPU, True)):
        place = dense.reserve("large", 10, TOTAL, device, torch.bfloat16)
        assert place is not None
        assert place.in_codes == in_codes
    monkeypatch.setenv(dense.VARIABLE, "3bit")
    assert dense.reserve("small", 1, 1, GPU, torch.bfloat16) is None
    monkeypatch.setenv(dense.VARIABLE, "4bit")
    with pytest.raises(ValueError, match="VLLM_MILO_DENSE='4bit': must be one of auto, 3bit, 16bit, 8bit"):
        dense.reserve("small", 1, 1, GPU, torch.bfloat16)


def test_codes_that_no_kernel_reads_or_that_are_far_off_are_not_kept(notes: dict):
    wide = dense.reserve("wide", 10**6, 1, GPU, torch.bfloat16)
    assert wide is None
    close, far = (dense.reserve(name, 7, 10, GPU, torch.bfloat16) for name in ("close", "far"))
    assert close is not None
    assert far is not None
    assert close.keep_codes(98, 0.01)
    assert not far.keep_codes(98, 0.03)
    assert notes[dense.NOTE] == {"close": 238, "far": 140}
    assert close.keep_codes(98, 0.03), "a layer that is loaded once more stays what it was"
    assert (far.keep_codes(98, 0.01), far.size) == (False, 140)
    assert (close.dropped, far.dropped) == (0, 0.03)


def test_the_log_says_how_many_layers_have_no_8_bits(caplog: pytest.LogCaptureFixture):
    load = account.Load()
    for layer, dropped in (("near", 0.0), ("far", 0.021), ("farther", 0.034)):
        load.widen(layer, 2**30, not dropped, dropped)
    with caplog.at_level(logging.INFO, "vllm.milo"):
        load.report(peak=0.0)
    assert "MiLo keeps 3 dense layers in 16 bits, 1 of these in 8 too, for few tokens: 3.00 GiB; " in caplog.text
    assert "2 of these are in 16 bits alone, since 8 would be off by up to 3.4 % of the weights' norm" in caplog.text
    assert "the first is far" in caplog.text


def test_none_is_kept_where_graphs_cannot_be_told_apart(monkeypatch: pytest.MonkeyPatch):
    from vllm.config import get_current_vllm_config

    monkeypatch.setenv(dense.VARIABLE, "16bit")
    monkeypatch.setattr(get_current_vllm_config(), "additional_config", SimpleNamespace(compute_hash=lambda: ""))
    assert dense.reserve("layer", 1, 1, torch.device("cpu"), torch.float32) is None


def test_graphs_of_layers_in_16_bits_are_told_apart(monkeypatch: pytest.MonkeyPatch):
    from vllm.config import get_current_vllm_config

    config = get_current_vllm_config()
    monkeypatch.setattr(config, "additional_config", {})
    before = config.compute_hash()
    monkeypatch.setenv(dense.VARIABLE, "16bit")
    assert dense.reserve("layer", 1, 1, torch.device("cpu"), torch.float32) is not None
    assert config.compute_hash() != before


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_in_16_bits_is_a_plain_one(
    bias: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv(dense.VARIABLE, "16bit")
    monkeypatch.setattr(account, "_current", account.Load())
    weights, spec = random_linear([128], [8], K, 64, 3)
    layer = make_layer("column", make_format({f"{PREFIX}.o_proj": 8}), [128], f"{PREFIX}.o_proj")
    load(layer, "column", checkpoint_tensors(weights, spec))
    with caplog.at_level(logging.INFO, "vllm.milo"):
        layer.quant_method.process_weights_after_loading(layer)
    assert {name: values.shape for name, values in layer.named_parameters()} == {"weight_packed": (128, K)}
    torch.testing.assert_close(layer.weight_packed, reference.expand_linear(weights, spec, torch.float32))
    x, extra = torch.randn(3, K), torch.randn(128) if bias else None
    found = layer.quant_method.apply(layer, x, extra)
    torch.testing.assert_close(found, reference.linear(x, weights, spec) + (0 if extra is None else extra))
    assert "MiLo keeps 1 dense layers in 16 bits, 0 of these in 8 too, for few tokens: 0.00 GiB; " in caplog.text


@pytest.mark.parametrize("far", [False, True])
def test_a_layer_in_8_bits_too_is_read_in_them(far: bool, monkeypatch: pytest.MonkeyPatch):
    """By Triton's kernels in the interpreter, unless 8 bits would be too far off."""
    notes: dict = {}
    monkeypatch.setenv(dense.VARIABLE, dense.CODED)
    monkeypatch.setattr(dense, "MOST_ERROR", 0.0001 if far else 0.02)
    sizes = 2 * 128 * K, 2 * 128 * K + code_bytes(128, K)
    monkeypatch.setattr(dense, "reserve", lambda name, *_: dense.Place(name, sizes[1], True, notes))
    monkeypatch.setattr(ops, "choose_backend", lambda *_: "triton")
    monkeypatch.setattr(account, "_current", account.Load())
    weights, spec = random_linear([128], [8], K, 64, 3)
    weights.scale[:] = 0.01
    weights.zero[:] = 3.5
    layer = make_layer("column", make_format({f"{PREFIX}.o_proj": 8}), [128], f"{PREFIX}.o_proj")
    layer.quant_method.dtype = torch.float16
    load(layer, "column", checkpoint_tensors(weights, spec))
    layer.quant_method.process_weights_after_loading(layer)
    names = ["weight_packed"] + ([] if far else ["milo_1", "milo_2"])
    assert [name for name, _ in layer.named_parameters()] == names
    assert list(notes[dense.NOTE].values()) == [sizes[not far]]
    layer.weight_packed.data.fill_(float("nan"))
    x = torch.randn(3, K).half()
    found, exact = layer.quant_method.apply(layer, x), reference.linear(x.double(), weights, spec)
    if far:
        assert bool(found.isnan().all())
    else:
        assert 1e-3 < relative_error(found, exact) < 0.02


def test_the_reference_rounds_once():
    weights, spec = random_linear([64, 32], [8, 0], 96, 32, 16)
    exact = reference.linear(torch.eye(96, dtype=torch.float64), LinearWeights(*weights), spec).T
    found = reference.expand_linear(weights, spec, torch.float16)
    assert found.shape == (96, 96)
    assert float((found.double() - exact).abs().max() / exact.abs().max()) < 2**-11
