"""Conversions along a text where memory is short: hidden states elsewhere, experts in rounds and on other devices."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import VOCABULARY

from vllm_milo.offline.along import layers as along_text
from vllm_milo.offline.calibration import memory
from vllm_milo.offline.calibration.memory import Layout, States
from vllm_milo.offline.checkpoint.report import REPORT_NAME
from vllm_milo.offline.conversion import Conversion, Text
from vllm_milo.offline.convert import convert
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.learn.layer import LearnOptions
from vllm_milo.offline.nouns import Recipe
from vllm_milo.offline.planning import disk
from vllm_milo.offline.planning.layout import arrange
from vllm_milo.offline.source.reader import ModelReader
from vllm_milo.offline.source.states import StatesHome
from vllm_milo.validation import read_format, validate_checkpoint

WINDOWS = torch.randint(0, VOCABULARY, (40, 64), generator=torch.Generator().manual_seed(0))
ALONG = Conversion(
    Recipe(max_rounds=1, feedback_rounds=0), budget_bits=3.9, text=Text("random", WINDOWS, LearnOptions(4, 2))
)
SHARD = "model-00001-of-00001.safetensors"
GIB = 2**30


def limited(reader: ModelReader, layout: Layout) -> Conversion:
    """The conversion with as much memory as a layout takes, and no more."""
    return replace(ALONG, device_memory=memory.streamed_need(reader, WINDOWS.numel(), "cpu", layout))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_hidden_states_on_the_disk_change_nothing(sources: dict[str, Path], tmp_path: Path, monkeypatch):
    reader, made = ModelReader(sources["olmoe"]), []
    real = StatesHome.empty
    monkeypatch.setattr(StatesHome, "empty", lambda self, *a: made.append(self.folder) or real(self, *a))
    whole = convert(reader.folder, tmp_path / "whole", ALONG, progress=False)
    assert set(made) == {None}
    made.clear()
    short = limited(reader, Layout(States.DISK))
    assert short.device_memory < memory.streamed_need(reader, WINDOWS.numel(), "cpu")
    convert(reader.folder, tmp_path / "short", short, progress=False)
    of_needs = None  # which are measured on a few windows
    assert set(made) == {of_needs, tmp_path / ".short.partial" / "checkpoint"}
    assert content(tmp_path / "short") == content(whole.out)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "short"}


@pytest.mark.parametrize("rounds", [2, 4])
def test_experts_in_rounds(sources: dict[str, Path], tmp_path: Path, rounds: int):
    reader = ModelReader(sources["olmoe"])
    out = convert(reader.folder, tmp_path / "out", limited(reader, Layout(States.DISK, rounds)), progress=False).out
    validate_checkpoint(out)
    assert read_format(out)[0].recipe["learn_rounds"] == rounds
    told = json.loads((out / REPORT_NAME).read_text())["layers"]
    assert all(said["after"] <= said["before"] for said in told.values())
    whole = convert(reader.folder, tmp_path / "whole", ALONG, progress=False).out
    assert "learn_rounds" not in read_format(whole)[0].recipe
    assert (whole / SHARD).read_bytes() != (out / SHARD).read_bytes()


def test_what_goes_on_keeps_to_its_rounds(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """More memory does not matter; less than before is refused, since the layers would be of two kinds."""
    reader = ModelReader(sources["olmoe"])
    two, four = (limited(reader, Layout(States.DISK, rounds)) for rounds in (2, 4))
    expected = content(convert(reader.folder, tmp_path / "whole", two, progress=False).out)
    real, calls = along_text.learn_layer, []

    def fails(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(along_text, "learn_layer", fails)
        with pytest.raises(KeyboardInterrupt):
            convert(reader.folder, tmp_path / "out", two, progress=False)
    with pytest.raises(ConversionError, match=r"of another conversion: recipe: learn_rounds was 2 and is 4"):
        convert(reader.folder, tmp_path / "out", replace(four, resume=True), progress=False)
    convert(reader.folder, tmp_path / "out", replace(ALONG, resume=True), progress=False)
    assert content(tmp_path / "out") == expected


def test_layouts_in_their_order(sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    """On GPUs of which one has too little: first the states go to the host, then experts to the others, then rounds."""
    reader, devices = ModelReader(sources["olmoe"]), [torch.device("cuda:0"), torch.device("cuda:1")]
    monkeypatch.setattr(memory, "_expert_weights", lambda layer: 8 * GIB)
    real = memory._weights
    monkeypatch.setattr(memory, "_weights", lambda reader, layer: real(reader, layer) + 8 * GIB)
    windows = torch.zeros(1, 1, dtype=torch.int64).expand(80_000, 512)
    free = {"cpu": 1000 * GIB, "cuda:1": 200 * GIB}
    monkeypatch.setattr(memory, "available", lambda device: free[device])

    def found(layout: Layout, disk_free: int = 0) -> Layout:
        """What is found where a layout fits just so."""
        free["cuda:0"] = memory.streamed_need(reader, windows.numel(), "cuda:0", layout)
        return arrange(reader, windows, devices, None, 2**20, disk_free)

    for layout in (Layout(), Layout(States.HOST), Layout(devices=2), Layout(States.HOST, devices=2)):
        assert found(layout) == layout
    assert found(Layout(States.HOST, rounds=2)) == Layout(States.HOST, devices=2)
    free["cuda:1"] = memory.further_need(reader, "cuda", Layout(devices=2)) - 1
    for layout in (Layout(States.HOST, rounds=2), Layout(States.HOST, rounds=2, devices=2)):
        assert found(layout) == layout
    free["cpu"] = 20 * GIB
    with pytest.raises(ConversionError, match=r"takes at least \d+\.\d\d GiB on cuda:0, training one expert"):
        found(Layout(States.HOST, rounds=2, devices=2))
    assert found(Layout(States.HOST, rounds=2), disk_free=500 * GIB) == Layout(States.DISK, rounds=2)


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Room is taken at once: a page that finds none later would end the process."""

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", full)
        with pytest.raises(ConversionError, match=r"take 0\.00 GiB here, .* too small for them: .* No space left"):
            StatesHome(torch.device("cpu"), tmp_path).empty((2, 3, 64), torch.bfloat16)
    states = StatesHome(torch.device("cpu"), tmp_path).empty((2, 3, 64), torch.bfloat16)
    states.copy_(torch.arange(384).view(2, 3, 64) % 100)
    assert states.sum() == sum(number % 100 for number in range(384))
    assert not list(tmp_path.iterdir())


def test_states_that_the_disk_has_no_room_for(sources: dict[str, Path], tmp_path: Path, monkeypatch):
    """They count with what the checkpoint takes; where the file system does not say, it is not relied on."""
    reader = ModelReader(sources["olmoe"])
    short = limited(reader, Layout(States.DISK, rounds=memory.most_experts(reader)))
    need = memory.states_need(reader, WINDOWS.numel(), "cpu")
    monkeypatch.setattr(disk, "free_bytes", lambda out: need)
    with pytest.raises(ConversionError, match=r"the checkpoint takes .* and .* are free on its file system"):
        convert(reader.folder, tmp_path / "out", short, progress=False)
    monkeypatch.setattr(disk, "free_bytes", lambda out: None)
    with pytest.raises(ConversionError, match=r"use --calibration-windows \d+, which should fit"):
        convert(reader.folder, tmp_path / "out", short, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [Layout(States.HOST), Layout(States.DISK), Layout(devices=2)], ids=str)
def test_layouts_of_a_gpu_change_nothing(small_model: Path, tmp_path: Path, monkeypatch, layout: Layout):
    """With captured steps, but where the state lies on two GPUs."""
    if layout.devices > torch.cuda.device_count():
        pytest.skip("needs two CUDA GPUs")
    text = Text("random", WINDOWS[:32].repeat(1, 4), LearnOptions(steps=12, batch=8))
    more = ("cuda:1",) if torch.cuda.device_count() > 1 else ()
    on_gpu = replace(ALONG, text=text, device="cuda:0", more_devices=more)
    monkeypatch.setattr("vllm_milo.offline.learn.groups.PIECE_WEIGHTS", 1)
    whole = content(convert(small_model, tmp_path / "whole", on_gpu, progress=False).out)
    monkeypatch.setattr("vllm_milo.offline.planning.plan.arrange", lambda *_, **__: layout)
    assert content(convert(small_model, tmp_path / "other", on_gpu, progress=False).out) == whole
