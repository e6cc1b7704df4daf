"""What the headers tell is checked before a weight is read, and what is planned is what is written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from folder_edits import edit_config, edit_tensors, narrow_down_projections
from refusals import FAST, Q_PROJ, WEIGHTS
from tiny_models import make_model

from vllm_milo.checkpoint import CheckpointError
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import carry_out, convert
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.nouns import Recipe
from vllm_milo.offline.planning.plan import make_plan
from vllm_milo.offline.ranks.policies import parse_policies
from vllm_milo.offline.source.reader import ModelReader
from vllm_milo.shards import read_tensors
from vllm_milo.validation import read_format, validate_checkpoint

MTP = "mtp.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight may be read."""
    monkeypatch.setattr(ModelReader, "load", lambda self, tensor: pytest.fail(f"{tensor} was read"))
    monkeypatch.setattr(ModelReader, "load_matrix", lambda self, source: pytest.fail(f"{source.tensor} was read"))


def refused_unread(source: Path, out: Path, message: str, conversion: Conversion | None = None) -> None:
    with pytest.raises((ConversionError, CheckpointError), match=message):
        convert(source, out, conversion or Conversion(FAST), progress=False)
    assert not list(out.parent.glob(f"*{out.name}*"))


def add_tensor(folder: Path, name: str, tensor: torch.Tensor) -> None:
    edit_tensors(folder, WEIGHTS, lambda tensors: tensors.update({name: tensor}))


@pytest.mark.parametrize("policies", ["dense=16", "dense=16,kurtosis=16"])
@pytest.mark.parametrize("bits", [3, 16])
@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_what_is_planned_is_written(family: str, bits: int, policies: str, sources: dict[str, Path], tmp_path: Path):
    conversion = Conversion(Recipe(max_rounds=1, factor_bits=bits, base="hqq"), parse_policies(policies))
    plan = make_plan(ModelReader(sources[family]), tmp_path / "out", conversion)
    summary = carry_out(plan, progress=False)
    written = read_tensors(tmp_path / "out")
    assert plan.exact == ("kurtosis" not in policies)
    if plan.exact:
        assert {name: entry[1:] for name, entry in plan.tensors.items()} == {n: e[1:] for n, e in written.items()}
        assert plan.tensor_bytes == summary.bytes_written
        assert plan.format() == read_format(tmp_path / "out")[0]
    assert plan.tensor_bytes == pytest.approx(summary.bytes_written, rel=0.02)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*"))
    assert on_disk <= plan.disk_bytes <= on_disk + 200_000


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (MTP, r"q_proj\.weight: a weight that mixtral does not have.*--ignore 're:mtp\\\.\.\*'"),
        ("model.layers.{}.adapter.weight", r"0\.adapter\.weight \(and 1 more\): .*'model\.layers\.0\.adapter'"),
        ("model.layers.{}.block_sparse_moe.router.weight", r"layers\.0\.block_sparse_moe\.router\.weight \(and 1"),
    ],
)
def test_weights_that_the_family_does_not_have(source: Path, tmp_path: Path, name: str, message: str):
    for layer in range(2):
        add_tensor(source, name.format(layer), torch.ones(64, 64))
    refused_unread(source, tmp_path / "out", message)


def test_they_are_copied_where_ignore_names_them(source: Path, tmp_path: Path):
    add_tensor(source, MTP, torch.ones(64, 64))
    convert(source, tmp_path / "out", Conversion(FAST, ignore=[r"re:mtp\..*"]), progress=False)
    assert validate_checkpoint(tmp_path / "out").ignores(MTP.removesuffix(".weight"))
    assert read_tensors(tmp_path / "out")[MTP].shape == (64, 64)


@pytest.mark.usefixtures("unread")
def test_a_layer_more_than_config_json_states(source: Path, tmp_path: Path):
    edit_config(source, num_hidden_layers=1)
    refused_unread(source, tmp_path / "out", r"model\.layers\.1: extra, config\.json states num_hidden_layers 1")


@pytest.mark.usefixtures("unread")
def test_fused_and_single_experts_at_once(source: Path, tmp_path: Path):
    for layer in range(2):
        add_tensor(source, f"model.layers.{layer}.mlp.experts.down_proj", torch.ones(4, 128, 128))
    refused_unread(source, tmp_path / "out", r"w2\.weight_packed comes from another tensor too")


@pytest.mark.parametrize("stated", [None, "float64", "torch.bfloat16"])
def test_factors_have_the_dtype_that_the_config_states(source: Path, tmp_path: Path, stated: str | None):
    edit_config(source, dtype=stated, torch_dtype=None)
    edit_tensors(source, WEIGHTS, lambda tensors: tensors.update({n: t.half() for n, t in tensors.items()}))
    conversion = Conversion(Recipe(max_rounds=1, factor_bits=16), parse_policies("dense=8"))
    convert(source, tmp_path / "out", conversion, progress=False)
    dtype = "BF16" if stated and "bfloat16" in stated else "F16"
    factor = Q_PROJ.replace(".weight", ".weight_u")
    assert read_tensors(tmp_path / "out")[factor].dtype == dtype


@pytest.mark.usefixtures("unread")
def test_an_input_size_that_no_group_divides(tmp_path: Path):
    source = make_model("qwen2_moe", tmp_path / "source")
    narrow_down_projections(source, WEIGHTS)
    refused_unread(source, tmp_path / "out", r"experts\.0\.down_proj: shape \[128, 80\]")


@pytest.mark.usefixtures("unread")
def test_a_disk_without_room(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    need = make_plan(ModelReader(source), tmp_path / "out", Conversion(FAST)).peak_disk_bytes
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10 * need, 0, need))
    assert make_plan(ModelReader(source), tmp_path / "out", Conversion(FAST)).peak_disk_bytes == need
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10 * need, 0, 2**17))
    message = r"out: the checkpoint takes 0\.\d MiB, and 0\.1 MiB are free on its file system; free space or choose"
    refused_unread(source, tmp_path / "out", message)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 0))  # as of /proc: not known
    make_plan(ModelReader(source), tmp_path / "out", Conversion(FAST))


@pytest.mark.usefixtures("unread")
def test_an_output_that_cannot_be_renamed_to(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr("os.path.ismount", lambda place: str(place) == str(tmp_path / "out"))
        refused_unread(source, tmp_path / "out", r"out: is a mount point .* name a folder in it, such as .*out/model")
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda place, mode: place != tmp_path)
        refused_unread(source, tmp_path / "a" / "out", r"out: cannot be written: .* may not be written to")
    refused_unread(source, tmp_path / ("x" * 250), "its name is too long; choose a shorter one")
    refused_unread(source, tmp_path / ("x" * 300), "name")


def test_a_folder_mounted_from_the_same_file_system(source: Path, tmp_path: Path):
    """As a volume of a container is: only the system's list of mounts tells."""
    (tmp_path / "host").mkdir()
    out = tmp_path / "with space"
    out.mkdir()
    script = 'mount --bind "$1" "$2" || exit 77; shift 2; exec "$@"'
    milo = [sys.executable, "-m", "vllm_milo.offline.cli", "quantize", str(source), "-o"]
    options = ["--calibration", "none", "--max-rounds", "1", "--quiet", "--device", "cpu"]
    for place, status, said in ((out, 1, "with space: is a mount point"), (out / "model", 0, "")):
        command = ["unshare", "-m", "sh", "-c", script, "-", str(tmp_path / "host"), str(out), *milo, str(place)]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        if done.returncode == 77 or "unshare failed" in done.stderr:
            pytest.skip("may not mount")
        assert (done.returncode, said in done.stderr) == (status, True), done.stderr
    assert validate_checkpoint(tmp_path / "host" / "model")
