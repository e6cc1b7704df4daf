"""Strict loading: what a checkpoint lacks, holds twice, or in another shape."""

from __future__ import annotations

import pytest
import torch
from plugin_layers import PREFIX, K, checkpoint_tensors, load, make_format, make_layer
from random_layers import random_linear

from vllm_milo.checkpoint import CheckpointError

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_rank")]


class TestStrictLoading:
    prefix = f"{PREFIX}.o_proj"

    @pytest.fixture
    def tensors(self) -> dict[str, torch.Tensor]:
        return checkpoint_tensors(*random_linear([128], [8], K, 64, 3))[0]

    @pytest.fixture
    def layer(self):
        return make_layer("column", make_format({self.prefix: 8}), [128], self.prefix)

    @pytest.mark.parametrize("name", ["weight_packed", "weight_zero", "weight_v", "weight_u_scale"])
    def test_missing(self, layer, tensors, name):
        del tensors[name]
        load(layer, "column", [tensors])
        message = rf"layer {self.prefix}: the checkpoint lacks {self.prefix}\.{name} \w+ \[[\d, ]+\]"
        with pytest.raises(CheckpointError, match=message):
            layer.quant_method.process_weights_after_loading(layer)

    @pytest.mark.parametrize("name", ["weight_packed", "weight_scale", "weight_u", "weight_v_scale"])
    def test_wrong_shape(self, layer, tensors, name):
        tensors[name] = tensors[name][:, :-1]
        with pytest.raises(CheckpointError, match=rf"{self.prefix}\.{name} .*: expected \w+ \[.*\], found"):
            load(layer, "column", [tensors])

    def test_wrong_dtype(self, layer, tensors):
        tensors["weight_scale"] = tensors["weight_scale"].float()
        with pytest.raises(CheckpointError, match=r"weight_scale .*: expected F16 \[128, 4\], found F32 \[128, 4\]"):
            load(layer, "column", [tensors])

    def test_twice(self, layer, tensors):
        load(layer, "column", [tensors])
        with pytest.raises(CheckpointError, match="weight_packed appears twice"):
            load(layer, "column", [tensors])

    def test_extra_factor(self, tensors):
        layer = make_layer("column", make_format(), [128], self.prefix)
        with pytest.raises(CheckpointError, match=r"weight_u is extra: the rank table gives it no place"):
            load(layer, "column", [tensors])

    def test_parts_fused_on_disk(self, tensors):
        layer = make_layer("merged", make_format(), [128, 128], "model.layers.0.mlp.gate_up_proj")
        parameter = layer.weight_packed
        with pytest.raises(CheckpointError, match=r"MiLo expects the tensors .*, but vLLM loads one for partitions"):
            parameter.weight_loader(parameter, tensors["weight_packed"])
