"""What validation says of a broken MiLo checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from folder_edits import edit_format, edit_tensors
from tiny_models import make_model

from vllm_milo.checkpoint import CheckpointError, split_expert_name
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.nouns import Recipe
from vllm_milo.offline.ranks.policies import parse_policies
from vllm_milo.shards import ShardError, read_tensors
from vllm_milo.validation import quantized_modules, validate_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    conversion = Conversion(Recipe(max_rounds=1), parse_policies("dense=16,sparse=8"))
    return convert(make_model("qwen2_moe", folder / "source"), folder / "milo", conversion, progress=False).out


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    """A MiLo checkpoint of its own, to be broken."""
    return Path(shutil.copytree(checkpoint, tmp_path / "broken"))


def assert_invalid(folder: Path, message: str, error=CheckpointError) -> None:
    with pytest.raises(error, match=message):
        validate_checkpoint(folder)


SHARD = "model-00001-of-00001.safetensors"


def test_newer_format(broken: Path):
    edit_format(broken, format_version=2)
    assert_invalid(broken, r"config\.json: quantization_config\.format_version is 2; .* upgrade vllm-milo")


def test_truncated_checkpoint(broken: Path):
    content = (broken / SHARD).read_bytes()
    (broken / SHARD).write_bytes(content[: len(content) // 2])
    assert_invalid(broken, "truncated", ShardError)


@pytest.mark.parametrize(
    ("was", "now"), [(b"data_offsets", b"data_offsete"), (b'"dtype"', b'"dtyqe"'), (b'"shape":[', b'"shape":{')]
)
def test_damaged_header(broken: Path, was: bytes, now: bytes):
    (broken / SHARD).write_bytes((broken / SHARD).read_bytes().replace(was, now, 1))
    assert_invalid(broken, rf"{SHARD}: (its header is damaged|not a safetensors file)", ShardError)


@pytest.mark.parametrize("tensor", ["weight_packed", "weight_scale", "weight_zero", "weight_u", "weight_v_scale"])
def test_missing_tensor_of_a_checkpoint(broken: Path, tensor: str):
    edit_tensors(broken, SHARD, lambda tensors: tensors.pop(f"model.layers.1.self_attn.o_proj.{tensor}"))
    assert_invalid(broken, rf"model\.layers\.1\.self_attn\.o_proj\.{tensor}: missing")


def test_missing_expert_of_a_checkpoint(broken: Path):
    def edit(tensors):
        for name in list(tensors):
            if ".layers.1.mlp.experts.2.up_proj." in name:
                del tensors[name]

    edit_tensors(broken, SHARD, edit)
    assert_invalid(broken, r"model\.layers\.1\.mlp\.experts\.2\.up_proj: missing \(6 experts\)")


def test_wrong_shape_of_a_checkpoint(broken: Path):
    name = "model.layers.1.self_attn.o_proj.weight_scale"
    edit_tensors(broken, SHARD, lambda tensors: tensors.update({name: tensors[name][:, :1].clone()}))
    assert_invalid(broken, r"o_proj\.weight_scale: expected F16 \[128, 2\] \(group size 64\), found F16 \[128, 1\]")


def test_wrong_dtype_of_a_checkpoint(broken: Path):
    name = "model.layers.1.self_attn.o_proj.weight_zero"
    edit_tensors(broken, SHARD, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    assert_invalid(broken, r"o_proj\.weight_zero: expected F16 .*, found BF16")


@pytest.mark.parametrize("tensor", ["weight", "weight_g_idx"])
def test_extra_tensor_of_a_checkpoint(broken: Path, tensor: str):
    name = f"model.layers.1.self_attn.o_proj.{tensor}"
    edit_tensors(broken, SHARD, lambda tensors: tensors.update({name: torch.zeros(128, 128)}))
    assert_invalid(broken, rf"o_proj\.{tensor}: extra, this matrix is quantized")


def test_unquantized_layer_that_ignore_does_not_name(broken: Path):
    fmt = json.loads((broken / "config.json").read_text())["quantization_config"]
    edit_format(broken, ignore=[key for key in fmt["ignore"] if "shared_expert_gate" not in key])
    assert_invalid(broken, r"shared_expert_gate\.weight: stored unquantized, but ignore does not name it")


def test_rank_table_that_disagrees(broken: Path):
    fmt = json.loads((broken / "config.json").read_text())["quantization_config"]
    fmt["ranks"]["modules"]["model.layers.0.self_attn.q_proj"] = 24
    edit_format(broken, ranks=fmt["ranks"])
    assert_invalid(broken, r"q_proj\.weight_u: expected I32 \[24, 12\] \(rank 24\), found I32 \[16, 12\]")


def test_rank_table_without_a_rank(broken: Path):
    fmt = json.loads((broken / "config.json").read_text())["quantization_config"]
    del fmt["ranks"]["modules"]["model.layers.0.self_attn.q_proj"]
    edit_format(broken, ranks=fmt["ranks"])
    assert_invalid(broken, r"q_proj\.weight_u: extra, the rank table gives this matrix rank 0")


def test_rank_table_of_another_expert_count(broken: Path):
    fmt = json.loads((broken / "config.json").read_text())["quantization_config"]
    fmt["ranks"]["experts"]["model.layers.1.mlp.experts"]["up_proj"] = [8] * 5
    edit_format(broken, ranks=fmt["ranks"])
    assert_invalid(broken, r"lists 5 ranks, but model\.layers\.1\.mlp\.experts has 6 experts")


def test_rank_table_with_an_unknown_name(broken: Path):
    fmt = json.loads((broken / "config.json").read_text())["quantization_config"]
    fmt["ranks"]["modules"]["model.layers.0.self_attn.qproj"] = 8
    edit_format(broken, ranks=fmt["ranks"])
    assert_invalid(broken, r"ranks: model\.layers\.0\.self_attn\.qproj is in the table, but the files hold no such")


class TestGroupSizes:
    """A checkpoint of groups of 64 and 128."""

    name = "model.layers.1.mlp.experts"

    @pytest.fixture(scope="class")
    def whole(self, odd_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        conversion = Conversion(Recipe("rtn", group_size=128))
        return convert(odd_model, tmp_path_factory.mktemp("mixed") / "milo", conversion, progress=False).out

    @pytest.fixture
    def mixed(self, whole: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(whole, tmp_path / "mixed"))

    def change(self, folder: Path, table: str, entries: dict) -> None:
        sizes = json.loads((folder / "config.json").read_text())["quantization_config"]["group_sizes"]
        sizes[table] |= entries
        edit_format(folder, group_sizes=sizes)

    def test_valid(self, mixed: Path):
        fmt = validate_checkpoint(mixed)
        assert fmt.group_size == 128
        assert fmt.module_group_size("model.layers.0.self_attn.q_proj") == 64

    def test_size_that_does_not_divide(self, mixed: Path):
        self.change(mixed, "modules", {"model.layers.0.self_attn.o_proj": 128})
        assert_invalid(mixed, r"layers\.0\.self_attn\.o_proj: input size 192 is not a multiple of group size 128")

    def test_table_without_a_size(self, mixed: Path):
        edit_format(mixed, group_sizes={})
        assert_invalid(mixed, r"input size 192 is not a multiple of group size 128")

    def test_table_that_disagrees_with_the_scales(self, mixed: Path):
        self.change(mixed, "modules", {"model.layers.0.mlp.down_proj": 64})
        assert_invalid(
            mixed, r"down_proj\.weight_scale: expected F16 \[192, 4\] \(group size 64\), found F16 \[192, 2\]"
        )

    def test_expert_that_disagrees_with_the_others(self, mixed: Path):
        name = f"{self.name}.2.down_proj.weight_zero"
        edit_tensors(mixed, SHARD, lambda tensors: tensors.update({name: tensors[name].repeat(1, 2)}))
        assert_invalid(mixed, r"experts\.2\.down_proj\.weight_zero: expected F16 \[192, 1\] \(group size 128\), found")

    def test_gate_that_disagrees_with_up(self, mixed: Path):
        self.change(mixed, "experts", {self.name: {"gate_proj": 32, "up_proj": 64}})
        assert_invalid(mixed, r"experts\['model\.layers\.1\.mlp\.experts'\] gives the gate projection groups of 32")

    def test_up_alone_that_disagrees_with_the_gate(self, mixed: Path):
        self.change(mixed, "experts", {self.name: {"up_proj": 32}})
        assert_invalid(
            mixed, r"experts: group_sizes gives the gate projections groups of \d+ and the up projections of 32"
        )

    @pytest.mark.parametrize("leaf", ["q_proj", "v_proj"])
    def test_fused_layers_that_disagree(self, mixed: Path, leaf: str):
        self.change(mixed, "modules", {f"model.layers.1.self_attn.{leaf}": 32})
        assert_invalid(mixed, rf"vLLM fuses these layers, which need one group size: .*{leaf} has 32")

    @pytest.mark.parametrize(
        ("table", "name", "size"),
        [
            ("modules", "model.layers.0.self_attn.qproj", 64),
            ("modules", "model.layers.1.mlp.experts.0.down_proj", 64),  # experts have a table of their own
            ("experts", "model.layers.0.mlp.experts", {"down_proj": 64}),  # layer 0 is dense
        ],
    )
    def test_unknown_name(self, mixed: Path, table: str, name: str, size):
        self.change(mixed, table, {name: size})
        assert_invalid(mixed, rf"group_sizes: {name} is in the table, but the files hold no such quantized matrix")


def test_not_a_milo_checkpoint(tmp_path: Path):
    assert_invalid(make_model("olmoe", tmp_path / "source"), "not a MiLo checkpoint; make one with `milo quantize")


def test_expert_names_of_a_checkpoint(checkpoint: Path):
    experts = [split_expert_name(name) for name in quantized_modules(read_tensors(checkpoint))]
    assert {found[1] for found in experts if found} == set(range(6))
