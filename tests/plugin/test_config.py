"""Which layers are quantized, under which names, and when the checkpoint is checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from plugin_layers import PREFIX, routed_experts
from tiny_models import fuse_experts, make_model

from vllm_milo.checkpoint import CheckpointError, GroupTable, MiLoFormat, RankTable
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.nouns import Recipe

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_rank")]


def quant_method(fmt: MiLoFormat, prefix: str):
    from vllm.model_executor.layers.linear import ReplicatedLinear

    from vllm_milo.config import MiLoConfig

    return MiLoConfig(fmt).get_quant_method(ReplicatedLinear(64, 64, bias=False), prefix)


@pytest.mark.parametrize("leaf", ["gate", "shared_expert_gate", "router"])
def test_routers_are_never_quantized(leaf: str):
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    assert isinstance(quant_method(MiLoFormat(), f"model.layers.0.mlp.{leaf}"), UnquantizedLinearMethod)


def test_ignored_layers_are_not_quantized():
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    from vllm_milo.linear import MiLoLinearMethod

    fmt = MiLoFormat(ignore=("re:.*q_proj", "re:.*k_proj", "re:.*v_proj"))
    assert isinstance(quant_method(fmt, f"{PREFIX}.qkv_proj"), UnquantizedLinearMethod)
    assert isinstance(quant_method(fmt, f"{PREFIX}.o_proj"), MiLoLinearMethod)
    with pytest.raises(CheckpointError, match=r"ignore names .*q_proj but not all parts of .*qkv_proj"):
        quant_method(MiLoFormat(ignore=("re:.*q_proj",)), f"{PREFIX}.qkv_proj")


@pytest.mark.parametrize("key", ["model.layers.0.mlp.experts", r"re:.*layers\.0\..*experts.*", r"re:.*\.experts"])
def test_ignored_experts_are_left_to_vllm(key: str):
    from vllm_milo.config import MiLoConfig
    from vllm_milo.fused_moe import MiLoMoEMethod

    config = MiLoConfig(MiLoFormat(ignore=(key,)))
    assert config.get_quant_method(routed_experts(), "model.layers.0.mlp.experts") is None
    other = config.get_quant_method(routed_experts(), "model.layers.1.mlp.experts")
    assert other is None if key == r"re:.*\.experts" else isinstance(other, MiLoMoEMethod)


def test_ignored_experts_follow_vllms_mapper():
    from vllm.model_executor.models.utils import WeightsMapper

    from vllm_milo.config import MiLoConfig
    from vllm_milo.fused_moe import MiLoMoEMethod

    config = MiLoConfig(MiLoFormat(ignore=("model.layers.0.mlp.experts",)))
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert config.get_quant_method(routed_experts(), "language_model.model.layers.0.mlp.experts") is None
    other = config.get_quant_method(routed_experts(), "model.layers.0.mlp.experts")
    assert isinstance(other, MiLoMoEMethod)


def test_fused_experts_that_vllm_would_pass_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from vllm_milo import compat
    from vllm_milo.config import MiLoConfig

    source = fuse_experts(make_model("olmoe", tmp_path / "source"), tmp_path / "fused")
    conversion = Conversion(Recipe("rtn"), ignore=["model.layers.1.mlp.experts"])
    out = convert(source, tmp_path / "out", conversion, progress=False).out
    config = MiLoConfig(MiLoFormat())
    monkeypatch.setattr(compat, "loads_fused_experts", lambda: True)
    config.maybe_update_config(str(out))
    monkeypatch.setattr(compat, "loads_fused_experts", lambda: False)
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.experts\.\w+: this version of vLLM does not load fused"
    ):
        config.maybe_update_config(str(out))


def test_other_layers_are_left_to_vllm():
    from vllm_milo.config import MiLoConfig

    assert MiLoConfig(MiLoFormat()).get_quant_method(torch.nn.Embedding(4, 4), "model.embed_tokens") is None


def test_names_follow_vllms_mapper():
    from vllm.model_executor.models.utils import WeightsMapper

    from vllm_milo.config import MiLoConfig

    fmt = MiLoFormat(
        128,
        ranks=RankTable(0, {"model.a": 8, "re:.*b": 16}, {"model.mlp.experts": {"w1": 8}}),
        ignore=("model.c",),
        groups=GroupTable({"model.a": 64, "re:.*b": 32}, {"model.mlp.experts": {"w2": 64}}),
    )
    config = MiLoConfig(fmt)
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert config.format.ranks.of_module("language_model.model.a") == 8
    assert config.format.ranks.of_module("language_model.model.b") == 16
    assert config.format.ranks.of_experts("language_model.model.mlp.experts", "w1", 2) == [8, 8]
    assert config.format.ignores("language_model.model.c")
    assert config.format.module_group_size("language_model.model.a") == 64
    assert config.format.module_group_size("language_model.model.b") == 32
    assert config.format.module_group_size("language_model.model.mlp.experts.1.w2") == 64
    assert config.format.group_size == 128


def test_checkpoint_is_checked_before_anything_is_allocated(tmp_path: Path):
    from vllm_milo.config import MiLoConfig
    from vllm_milo.shards import ShardError

    config = MiLoConfig(MiLoFormat())
    config.maybe_update_config("org/a-model-of-the-hub")
    config.maybe_update_config(str(tmp_path))  # a config without weights is served with dummy ones
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "milo", "format_version": 1}}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ShardError, match=r"model\.safetensors: truncated"):
        config.maybe_update_config(str(tmp_path), hf_config=None, revision=None)


def test_weight_v_keeps_its_name():
    """transformers takes it for its weight norm's, and vLLM renames what transformers does."""
    from vllm_milo.config import MiLoConfig

    config, names = MiLoConfig(MiLoFormat()), ["a.q_proj.parametrizations.weight.original1", "a.q_proj.weight_v"]
    assert config.get_checkpoint_weight_mapper().apply_list(names) == ["a.q_proj.weight_v"] * 2
    assert config.get_checkpoint_weight_mapper().apply_list(["a.g_idx"]) == []  # as vLLM has it
    assert config.get_cache_scale_mapper().apply_list([names[0], "a.k_scale"]) == [names[0], "a.attn.k_scale"]


def test_weight_v_keeps_its_name_in_versions_with_one_mapper(monkeypatch: pytest.MonkeyPatch):
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    from vllm_milo.config import MiLoConfig

    monkeypatch.delattr(QuantizationConfig, "get_checkpoint_weight_mapper")
    config, name = MiLoConfig(MiLoFormat()), "a.q_proj.parametrizations.weight.original1"
    assert config.get_cache_scale_mapper().apply_list([name, "a.k_scale"]) == ["a.q_proj.weight_v", "a.attn.k_scale"]
    monkeypatch.setattr(QuantizationConfig, "get_cache_scale_mapper", lambda self: None)
    assert config.get_cache_scale_mapper().apply_list([name, "a.k_scale"]) == ["a.q_proj.weight_v", "a.k_scale"]
