"""What validation says of a checkpoint whose unquantized experts are not whole, or not of the model's sizes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from folder_edits import edit_config, edit_format, edit_tensors
from tiny_models import fuse_experts, make_model

from vllm_milo.checkpoint import CheckpointError
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.nouns import Recipe
from vllm_milo.validation import validate_checkpoint

SHARD = "model-00001-of-00001.safetensors"
EXPERTS = "model.layers.1.mlp.experts"
NAME = EXPERTS.replace(".", r"\.")


@pytest.fixture(scope="module", params=["each", "fused"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    source = make_model("qwen3_moe", folder / "each")
    if request.param == "fused":
        source = fuse_experts(source, folder / "fused")
    (folder / "out").mkdir()
    return convert(source, folder / "out" / request.param, Conversion(Recipe("rtn"), ignore=[EXPERTS]), False).out


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of its own, to be broken."""
    return Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))


def is_fused(folder: Path) -> bool:
    return folder.name == "fused"


def assert_invalid(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        validate_checkpoint(folder)


def edit(folder: Path, change) -> None:
    """Change the tensors of the unquantized experts, by their names in the module."""

    def within(tensors):
        mine = {name: tensors.pop(name) for name in list(tensors) if name.startswith(f"{EXPERTS}.")}
        inside = {name.removeprefix(f"{EXPERTS}."): tensor for name, tensor in mine.items()}
        change(inside)
        tensors.update({f"{EXPERTS}.{name}": tensor.contiguous() for name, tensor in inside.items()})

    edit_tensors(folder, SHARD, within)


def test_experts_that_ignore_does_not_name(broken: Path):
    fmt = json.loads((broken / "config.json").read_text())["quantization_config"]
    edit_format(broken, ignore=[key for key in fmt["ignore"] if key != EXPERTS])
    assert_invalid(broken, rf"{NAME}\.[\w.]+: stored unquantized, but ignore does not name {NAME}")


def test_quantized_experts_that_ignore_names(broken: Path):
    fmt = json.loads((broken / "config.json").read_text())["quantization_config"]
    edit_format(broken, ignore=[*fmt["ignore"], EXPERTS.replace("1", "0")])
    assert_invalid(broken, r"layers\.0\.mlp\.experts: is in ignore but has quantized experts")


def test_some_quantized_and_some_not(broken: Path):
    def add(tensors):
        for leaf in ("weight_packed", "weight_scale", "weight_zero"):
            tensors[f"0.up_proj.{leaf}"] = others[f"model.layers.0.mlp.experts.0.up_proj.{leaf}"]

    others: dict = {}
    edit_tensors(broken, SHARD, lambda tensors: others.update({name: one.clone() for name, one in tensors.items()}))
    edit(broken, add)
    assert_invalid(broken, rf"{NAME}: some of its experts are quantized and some are not")


def test_both_fused_and_one_by_one(broken: Path):
    def add(tensors):
        if is_fused(broken):
            tensors["0.up_proj.weight"] = tensors["gate_up_proj"][0, 128:].clone()
        else:
            tensors["down_proj"] = torch.stack([tensors[f"{index}.down_proj.weight"] for index in range(8)])

    edit(broken, add)
    assert_invalid(broken, rf"{NAME}: holds experts both fused and one by one")


def test_missing_tensor(broken: Path):
    name = "down_proj" if is_fused(broken) else "3.down_proj.weight"
    edit(broken, lambda tensors: tensors.pop(name))
    assert_invalid(broken, rf"{NAME}\.{name.removesuffix('.weight')}: missing")


def test_missing_experts(broken: Path):
    edit(broken, lambda tensors: tensors.clear())
    assert_invalid(broken, rf"{NAME}: missing, neither quantized nor as ignore says")


def test_missing_last_experts(broken: Path):
    def drop(tensors):
        for name in list(tensors):
            if is_fused(broken):
                tensors[name] = tensors[name][:7]
            elif name.startswith("7."):
                del tensors[name]

    edit(broken, drop)
    message = r"\.gate_up_proj: expected \[8, 256, 128\] by config.json, found \[7, 256, 128\]"
    assert_invalid(broken, NAME + (message if is_fused(broken) else ": holds 7 experts, but config.json states 8"))


def test_wrong_shape(broken: Path):
    name = "down_proj" if is_fused(broken) else "3.down_proj.weight"
    edit(broken, lambda tensors: tensors.update({name: tensors[name][..., :64]}))
    assert_invalid(broken, rf"{NAME}\.{name}: expected \[(8, )?128, 128\] by config.json, found \[(8, )?128, 64\]")


def test_sizes_that_config_does_not_state(broken: Path):
    edit_config(broken, num_experts=None, num_local_experts=None, moe_intermediate_size=None, intermediate_size=None)
    validate_checkpoint(broken)
