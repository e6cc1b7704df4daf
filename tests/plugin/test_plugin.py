"""The plugin's parts inside vLLM but without an engine: config, loaders, refusals, tensor-parallel slices."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from random_layers import random_linear

from vllm_milo.checkpoint import CheckpointError, CompensatorFormat, MiLoFormat, RankTable
from vllm_milo.kernels import reference
from vllm_milo.kernels.weights import LinearSpec, LinearWeights, factor_elements, offsets

pytestmark = pytest.mark.vllm
K = 256
PREFIX = "model.layers.0.self_attn"


@pytest.fixture(scope="module", autouse=True)
def _vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One process that vLLM takes for rank 0 of 1."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel

    store = tmp_path_factory.mktemp("store") / "file"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield
    cleanup_dist_env_and_memory()


def make_format(modules: dict[str, int] | None = None, bits: int = 3, **options) -> MiLoFormat:
    return MiLoFormat(
        compensator=CompensatorFormat(bits), ranks=RankTable(0, modules or {}), ignore=("lm_head",), **options
    )


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    """Let vLLM's layers believe that this process is one of several tensor-parallel ranks."""
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear

    for module in (parameter, linear):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)


def make_layer(kind: str, fmt: MiLoFormat, widths: list[int], prefix: str, heads: int = 0):
    from vllm.model_executor.layers import linear

    from vllm_milo.config import MiLoConfig

    options = {"bias": False, "quant_config": MiLoConfig(fmt), "prefix": prefix, "params_dtype": torch.float32}
    if kind == "qkv":
        head = widths[1] // heads
        return linear.QKVParallelLinear(K, head, widths[0] // head, heads, **options)
    if kind == "merged":
        return linear.MergedColumnParallelLinear(K, widths, **options)
    if kind == "row":
        return linear.RowParallelLinear(K, widths[0], **options)
    return linear.ColumnParallelLinear(K, widths[0], **options)


def checkpoint_tensors(weights: LinearWeights, spec: LinearSpec) -> list[dict[str, torch.Tensor]]:
    """The tensors of each part as a checkpoint holds them."""
    rows, ranks = offsets(spec.widths), offsets(spec.ranks)
    elements = [factor_elements(width, spec.factor_bits) for width in spec.widths]
    u = offsets([rank * row for rank, row in zip(spec.ranks, elements, strict=True)])
    scales = offsets([rank * (width // 64) for rank, width in zip(spec.ranks, spec.widths, strict=True)])
    parts = []
    for part, rank in enumerate(spec.ranks):
        block, factor = slice(rows[part], rows[part + 1]), slice(ranks[part], ranks[part + 1])
        tensors = {
            "weight_packed": weights.packed[block],
            "weight_scale": weights.scale[block],
            "weight_zero": weights.zero[block],
        }
        if rank:
            tensors["weight_u"] = weights.u[u[part] : u[part + 1]].view(rank, -1)
            tensors["weight_v"] = weights.v[factor]
        if rank and spec.factor_bits != 16:
            tensors["weight_u_scale"] = weights.u_scale[scales[part] : scales[part + 1]].view(rank, -1)
            tensors["weight_v_scale"] = weights.v_scale[factor]
        parts.append(tensors)
    return parts


def load(layer, kind: str, tensors: list[dict[str, torch.Tensor]]) -> None:
    ids = {"qkv": ["q", "k", "v"], "merged": [0, 1]}.get(kind, [None])
    for shard_id, part in zip(ids, tensors, strict=True):
        for name, tensor in part.items():
            parameter = getattr(layer, name)
            extra = () if shard_id is None else (shard_id,)
            parameter.weight_loader(parameter, tensor, *extra)


LAYERS = {
    "qkv": ([512, 128, 128], [16, 8, 0], f"{PREFIX}.qkv_proj", ["q_proj", "k_proj", "v_proj"], 2),
    "qkv replicated": ([512, 64, 64], [16, 8, 24], f"{PREFIX}.qkv_proj", ["q_proj", "k_proj", "v_proj"], 1),
    "merged": ([256, 256], [8, 24], "model.layers.0.mlp.gate_up_proj", ["gate_proj", "up_proj"], 0),
    "row": ([192], [16], f"{PREFIX}.o_proj", ["o_proj"], 0),
    "column": ([256], [0], f"{PREFIX}.q_b_proj", ["q_b_proj"], 0),
}


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("bits", [3, 8, 16])
@pytest.mark.parametrize("name", LAYERS)
def test_ranks_together_give_the_whole_layer(name: str, bits: int, tp: int, monkeypatch: pytest.MonkeyPatch):
    widths, ranks, prefix, leaves, heads = LAYERS[name]
    kind = name.split()[0]
    parent = prefix.rpartition(".")[0]
    fmt = make_format({f"{parent}.{leaf}": rank for leaf, rank in zip(leaves, ranks, strict=True)}, bits)
    weights, spec = random_linear(widths, ranks, K, 64, bits)
    x = torch.randn(5, K)
    expected = reference.linear(x, weights, spec)
    columns = offsets(widths)
    found: list[torch.Tensor] = []
    for rank in range(tp):
        as_rank(monkeypatch, rank, tp)
        layer = make_layer(kind, fmt, widths, prefix, heads)
        load(layer, kind, checkpoint_tensors(weights, spec))
        layer.quant_method.process_weights_after_loading(layer)
        own = x.chunk(tp, dim=-1)[rank].contiguous() if kind == "row" else x
        found.append(layer.quant_method.apply(layer, own))
    if kind == "row":
        torch.testing.assert_close(sum(found), expected)
        return
    for part in range(len(widths)):
        replicas = max(1, tp // heads) if kind == "qkv" and part > 0 else 1
        own = offsets([width // tp * (max(1, tp // heads) if heads and i > 0 else 1) for i, width in enumerate(widths)])
        pieces = [found[rank][:, own[part] : own[part + 1]] for rank in range(0, tp, replicas)]
        torch.testing.assert_close(torch.cat(pieces, 1), expected[:, columns[part] : columns[part + 1]])


def test_bias_is_added():
    weights, spec = random_linear([128], [8], K, 64, 3)
    layer = make_layer("column", make_format({f"{PREFIX}.o_proj": 8}), [128], f"{PREFIX}.o_proj")
    load(layer, "column", checkpoint_tensors(weights, spec))
    layer.quant_method.process_weights_after_loading(layer)
    x, bias = torch.randn(3, K), torch.randn(128)
    found = layer.quant_method.apply(layer, x, bias)
    torch.testing.assert_close(found, reference.linear(x, weights, spec) + bias)


@pytest.mark.parametrize(
    ("kind", "widths", "k", "message"),
    [
        ("qkv", [256, 64, 64], K, r"k_proj: tensor parallel size 2 leaves output size 32, .* multiple of 64"),
        ("merged", [192, 192], K, r"gate_proj: tensor parallel size 2 leaves output size 96"),
        ("row", [128], 192, r"o_proj: tensor parallel size 2 leaves input size 96, .* multiple of 64"),
    ],
)
def test_splits_that_cut_a_group_are_refused(kind, widths, k, message, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules[__name__], "K", k)
    as_rank(monkeypatch, 0, 2)
    leaf = {"qkv": "qkv_proj", "merged": "gate_up_proj", "row": "o_proj"}[kind]
    fmt = MiLoFormat(ranks=RankTable(8))
    with pytest.raises(CheckpointError, match=message):
        make_layer(kind, fmt, widths, f"{PREFIX}.{leaf}", heads=2)


def test_split_of_a_layer_without_compensators_needs_only_groups(monkeypatch: pytest.MonkeyPatch):
    as_rank(monkeypatch, 0, 2)
    make_layer("qkv", MiLoFormat(), [256, 64, 64], f"{PREFIX}.qkv_proj", heads=2)


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
        with pytest.raises(CheckpointError, match=r"MiLo checkpoints store .* apart, found one tensor"):
            parameter.weight_loader(parameter, tensors["weight_packed"])


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


def test_other_layers_are_left_to_vllm():
    from vllm_milo.config import MiLoConfig

    assert MiLoConfig(MiLoFormat()).get_quant_method(torch.nn.Embedding(4, 4), "model.embed_tokens") is None


def test_names_follow_vllms_mapper():
    from vllm.model_executor.models.utils import WeightsMapper

    from vllm_milo.config import MiLoConfig

    fmt = MiLoFormat(
        ranks=RankTable(0, {"model.a": 8, "re:.*b": 16}, {"model.mlp.experts": {"w1": 8}}), ignore=("model.c",)
    )
    config = MiLoConfig(fmt)
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert config.format.ranks.of_module("language_model.model.a") == 8
    assert config.format.ranks.of_module("language_model.model.b") == 16
    assert config.format.ranks.of_experts("language_model.model.mlp.experts", "w1", 2) == [8, 8]
    assert config.format.ignores("language_model.model.c")


def moe_layer(**options):
    """What MiLoMoEMethod reads of a RoutedExperts layer."""
    layer = torch.nn.Module()
    layer.moe_config = SimpleNamespace(tp_rank=0, tp_size=options.pop("tp_size", 1))
    defaults = {"activation": SimpleNamespace(value="silu"), "apply_router_weight_on_input": False}
    layer.global_num_experts = 4
    layer._map_global_expert_id_to_local_expert_id = lambda expert: expert
    for name, value in {**defaults, **options}.items():
        setattr(layer, name, value)
    return layer


def create_experts(layer, fmt: MiLoFormat | None = None, intermediate: int = 128, **moe):
    from vllm_milo.fused_moe import MiLoMoEMethod

    config = SimpleNamespace(**{"has_bias": False, "is_act_and_mul": True, "is_lora_enabled": False, **moe})
    method = MiLoMoEMethod(fmt or MiLoFormat(ranks=RankTable(8)), config, "model.layers.0.mlp.experts")
    method.create_weights(layer, 4, 128, intermediate, torch.float32, weight_loader=None)
    return method


@pytest.mark.parametrize(
    ("layer", "moe", "message"),
    [
        ({}, {"has_bias": True}, "experts with biases"),
        ({}, {"is_act_and_mul": False}, "experts without a gate"),
        ({}, {"is_lora_enabled": True}, "LoRA on experts"),
        ({"activation": SimpleNamespace(value="relu2")}, {}, "the activation 'relu2'"),
        ({"swiglu_limit": 7.0}, {}, "swiglu_limit"),
    ],
)
def test_unsupported_experts_are_refused(layer, moe, message):
    with pytest.raises(CheckpointError, match=rf"model\.layers\.0\.mlp\.experts: MiLo does not support .*{message}"):
        create_experts(moe_layer(**layer), **moe)


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


def test_entry_point_registers_the_method_lazily():
    code = (
        "import sys; from importlib.metadata import entry_points\n"
        "(point,) = entry_points(group='vllm.general_plugins', name='milo')\n"
        "register = point.load(); assert 'vllm' not in sys.modules and 'torch' not in sys.modules\n"
        "register(); register()\n"
        "from vllm.model_executor.layers.quantization import get_quantization_config\n"
        "assert get_quantization_config('milo').__name__ == 'MiLoConfig'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
