"""A conversion that ended early goes on with its finished layers, and never with those of another one."""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from refusals import FAST
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY

from vllm_milo.offline import convert as converter
from vllm_milo.offline.along import layers as along_text
from vllm_milo.offline.checkpoint import writer
from vllm_milo.offline.checkpoint.claim import Claim
from vllm_milo.offline.cli import main as milo
from vllm_milo.offline.conversion import Conversion, Text
from vllm_milo.offline.convert import convert
from vllm_milo.offline.durable import files
from vllm_milo.offline.durable.journal import Journal
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.learn.end_to_end import TuneOptions
from vllm_milo.offline.learn.layer import LearnOptions
from vllm_milo.offline.nouns import Recipe
from vllm_milo.offline.ranks.policies import parse_policies
from vllm_milo.offline.spread import job


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def along(tune: bool = False) -> Conversion:
    windows = torch.randint(0, VOCABULARY, (4, 48), generator=torch.Generator().manual_seed(0))
    text = Text("random", windows, LearnOptions(steps=2, batch=2), TuneOptions(steps=2, batch=2) if tune else None)
    recipe = Recipe(max_rounds=1, feedback_rounds=1)
    return Conversion(recipe, parse_policies("uniform=8"), text=text, shard_bytes=100_000)


PLAIN = Conversion(FAST, parse_policies("uniform=8"), shard_bytes=60_000)


def with_(conversion: Conversion, **changes) -> Conversion:
    return Conversion(**{**vars(conversion), **changes})


def end_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int, error: BaseException) -> None:
    """Let a function of the converter raise an error when it is called for so many times."""
    place = converter if hasattr(converter, name) else along_text
    real, calls = getattr(place, name), []

    def fails(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(place, name, fails)


ENDS = {
    "plain": (PLAIN, "load_batches", 3),
    "text": (along(), "learn_layer", 2),
    "measured": (with_(along(), policies=(), budget_bits=3.9), "learn_layer", 2),
    "tuned": (along(tune=True), "tune", 1),
}


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("factor_bits", [3, 16])
def test_the_rest_gives_the_same_bytes(
    how: str, factor_bits: int, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    conversion, name, call = ENDS[how]
    conversion = with_(conversion, recipe=Recipe(**{**vars(conversion.recipe), "factor_bits": factor_bits}))
    source, out = sources["qwen2_moe"], tmp_path / "out"
    whole = content(convert(source, tmp_path / "whole", conversion, progress=False).out)
    with monkeypatch.context() as patch:
        end_at(patch, name, call, RuntimeError("a defect"))
        with pytest.raises(RuntimeError, match="a defect") as raised:
            convert(source, out, conversion, progress=False)
    done = 2 if how == "tuned" else 1
    assert raised.value.__notes__ == [
        f"{done} of 2 layers are kept in {tmp_path / '.out.partial'}; go on with the same command and --resume"
    ]
    assert not out.exists()
    assert hidden(tmp_path) == [".out.partial"]
    summary = convert(source, out, with_(conversion, resume=True), progress=False)
    assert content(out) == whole
    assert ("needs" in json.loads(whole["milo_report.json"])) == (how == "measured")
    assert summary.warnings[0] == f"{out}: going on after {done} of 2 layers"
    assert summary.bytes_written == json.loads(whole["model.safetensors.index.json"])["metadata"]["total_size"]
    assert hidden(tmp_path) == []


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["text", "measured"])
def test_the_rest_gives_the_same_bytes_on_a_gpu(
    how: str, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    conversion, name, call = ENDS[how]
    conversion = with_(conversion, device="cuda")
    whole = content(convert(sources["qwen3_moe"], tmp_path / "whole", conversion, progress=False).out)
    with monkeypatch.context() as patch:
        end_at(patch, name, call, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert(sources["qwen3_moe"], tmp_path / "out", conversion, progress=False)
    assert (tmp_path / ".out.partial").is_dir()
    convert(sources["qwen3_moe"], tmp_path / "out", with_(conversion, resume=True), progress=False)
    assert content(tmp_path / "out") == whole


def test_finished_layers_run_again_and_are_not_solved_again(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Hidden states are made anew, and nothing of them is kept."""
    conversion, solved = along(), []
    with monkeypatch.context() as patch:
        end_at(patch, "learn_layer", 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert(sources["qwen2_moe"], tmp_path / "out", conversion, progress=False)
    layers = tmp_path / ".out.partial" / "layers"
    assert {path.suffix for path in layers.iterdir()} <= {".json", ".safetensors"}
    assert len(list(layers.glob("*.safetensors"))) <= len(list(layers.glob("*.json")))
    real = job.quantize_matrices
    monkeypatch.setattr(job, "quantize_matrices", lambda *a: solved.append(1) or real(*a))
    end_at(monkeypatch, "learn_layer", 1, KeyboardInterrupt())
    looked = "vllm_milo.offline.along.layers.refuse_broken_weights"
    monkeypatch.setattr(looked, lambda *_: pytest.fail("looked at again"))
    with pytest.raises(KeyboardInterrupt):
        convert(sources["qwen2_moe"], tmp_path / "out", with_(conversion, resume=True))
    assert "replay: " in capsys.readouterr().err
    only_the_second = len(solved)
    solved.clear()
    monkeypatch.undo()
    monkeypatch.setattr(job, "quantize_matrices", lambda *a: solved.append(1) or real(*a))
    convert(sources["qwen2_moe"], tmp_path / "whole", conversion, progress=False)
    assert 0 < only_the_second < len(solved)


@pytest.fixture
def interrupted(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output of a plain conversion of ``source`` that ended in its last layer."""
    with monkeypatch.context() as patch:
        end_at(patch, "load_batches", 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", PLAIN, progress=False)
    assert len(list((tmp_path / ".out.partial" / "layers").glob("*.json"))) == 2
    return tmp_path / "out"


def touch(source: Path) -> None:
    os.utime(source / "model.safetensors", ns=(0, 0))


def edit_config(source: Path) -> None:
    (source / "config.json").write_text((source / "config.json").read_text() + "\n")


@pytest.mark.parametrize(
    ("changes", "edit", "message"),
    [
        ({"policies": parse_policies("uniform=16")}, None, "recipe: ranks was uniform=8 and is uniform=16"),
        ({"recipe": Recipe(max_rounds=2)}, None, "recipe: max_rounds was 1 and is 2"),
        ({"ignore": [r"re:.*\.layers\.0\.self_attn.*"]}, None, r"ignore was \[\] and is \['re:"),
        ({"text": along().text}, None, "recipe: calibration was none and is random"),
        ({}, touch, "source: model.safetensors: changed was"),
        ({}, edit_config, "source: config.json was"),
    ],
)
def test_layers_of_another_conversion_are_refused(interrupted: Path, source: Path, changes, edit, message: str):
    if edit:
        edit(source)
    with pytest.raises(ConversionError, match=rf"are of another conversion: .*{message}.*start over with --overwrite"):
        convert(source, interrupted, with_(PLAIN, resume=True, **changes), progress=False)
    assert interrupted.with_name(".out.partial").is_dir()


def test_layers_of_another_version_are_refused(interrupted: Path, source: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vllm_milo.offline.planning.plan.__version__", "9.9")
    with pytest.raises(ConversionError, match=r"recipe: tool was vllm-milo .* and is vllm-milo 9.9"):
        convert(source, interrupted, with_(PLAIN, resume=True), progress=False)


def test_finished_layers_are_not_deleted_unasked(interrupted: Path, source: Path):
    with pytest.raises(ConversionError, match=r"1 of 2 layers of a conversion that did not end .* go on with --resume"):
        convert(source, interrupted, PLAIN, progress=False)
    summary = convert(source, interrupted, with_(PLAIN, overwrite=True), progress=False)
    assert "1 of 2 layers of a conversion that did not end will be deleted" in summary.warnings[0]
    assert hidden(interrupted.parent) == []


@pytest.mark.parametrize("what", ["layer", "shard", "record"])
def test_damaged_layers_are_refused(interrupted: Path, source: Path, what: str):
    partial = interrupted.with_name(".out.partial")
    pattern = {
        "layer": "layers/*1.safetensors",
        "shard": "checkpoint/model-00001.safetensors",
        "record": "layers/*.json",
    }
    path = next(partial.glob(pattern[what]))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConversionError, match=r"\.out\.partial.*start over with --overwrite"):
        convert(source, interrupted, with_(PLAIN, resume=True), progress=False)
    assert partial.is_dir()
    convert(source, interrupted, with_(PLAIN, overwrite=True), progress=False)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("journal.json", '{"version": 1, "layers": 2, "fingerprint": []}'),
        ("journal.json", '{"version": 1, "layers": "2", "fingerprint": {}}'),
        ("layers/00000.json", '{"layers": [], "tensors": {}, "file": [1, "a"], "ranks": {}, "said": {}}'),
        ("layers/00000.json", '{"layers": [], "tensors": [], "file": [1, "a"], "ranks": {}, "said": 3}'),
    ],
)
def test_records_that_hold_something_else_are_refused(interrupted: Path, source: Path, name: str, content: str):
    (interrupted.with_name(".out.partial") / name).write_text(content)
    with pytest.raises(
        ConversionError, match=r"\.out\.partial: its records cannot be read.*start over with --overwrite"
    ):
        convert(source, interrupted, with_(PLAIN, resume=True), progress=False)


def test_resume_begins_where_there_is_nothing(source: Path, tmp_path: Path):
    summary = convert(source, tmp_path / "out", with_(PLAIN, resume=True), progress=False)
    assert summary.warnings[0].endswith("there is nothing to go on with; the conversion begins")


def test_an_error_of_a_resumed_conversion_deletes_nothing(
    interrupted: Path, source: Path, monkeypatch: pytest.MonkeyPatch
):
    end_at(monkeypatch, "load_batches", 1, ConversionError("too little memory"))
    with pytest.raises(ConversionError, match="too little memory"):
        convert(source, interrupted, with_(PLAIN, resume=True), progress=False)
    assert interrupted.with_name(".out.partial").is_dir()


def test_files_of_layers_go_when_their_shards_are_complete(interrupted: Path):
    partial = interrupted.with_name(".out.partial")
    assert not (partial / "layers" / "00000.safetensors").exists()
    assert (partial / "layers" / "00001.safetensors").exists()
    assert len(list((partial / "shards").iterdir())) >= 2


@pytest.mark.parametrize("can", [True, False])
def test_a_layer_that_is_a_shard_is_written_once(
    can: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where the file system has links; the bytes are the same."""
    whole = convert(source, tmp_path / "one", with_(PLAIN, shard_bytes=2**30), progress=False).out
    sizes = {}
    for name, tensor in load_file(whole / "model-00001-of-00001.safetensors").items():
        index = re.search(r"layers\.\d+", name)
        sizes[index and index[0]] = sizes.get(index and index[0], 0) + tensor.nbytes
    conversion = with_(PLAIN, shard_bytes=max(sizes[name] for name in ("layers.0", "layers.1")))
    written = []
    real = writer.save_tensors
    monkeypatch.setattr(writer, "save_tensors", lambda *a: written.append(1) or real(*a))
    expected = content(convert(source, tmp_path / "whole", with_(conversion, resume=False), progress=False).out)
    once = len(written)
    if not can:
        monkeypatch.setattr(Journal, "link", lambda *_: False)
    written.clear()
    assert content(convert(source, tmp_path / "out", conversion, progress=False).out) == expected
    shards = [name for name in expected if name.startswith("model-")]
    assert len(written) == (once if can else len(shards))
    assert once < len(shards)


def test_a_full_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Says how much is needed, and the next process goes on."""
    whole = content(convert(source, tmp_path / "whole", PLAIN, progress=False).out)
    calls = []

    def full(tensors, path, **options):
        calls.append(path)
        if len(calls) == 3:
            Path(path).write_bytes(b"half a layer")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full)
        with pytest.raises(
            ConversionError, match=r"(?s)the disk is full \(.* MiB free, the next file takes .*--resume"
        ):
            convert(source, tmp_path / "out", PLAIN, progress=False)
    convert(source, tmp_path / "out", with_(PLAIN, resume=True), progress=False)
    assert content(tmp_path / "out") == whole


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 2 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting is not permitted")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting is not permitted")
    yield place
    gc.collect()  # an error may hold tensors that lie in files there
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_full_indeed(
    small_model: Path, small_disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """As where something else takes the room that there was at first."""
    monkeypatch.setattr("vllm_milo.offline.planning.disk.free_bytes", lambda _: None)
    command = ["quantize", str(small_model), "-o", str(small_disk / "out"), "--quiet", "--device", "cpu"]
    command += ["--calibration", "none", "--max-rounds", "1"]
    assert milo(command) == 1
    assert "the disk is full" in (said := capsys.readouterr().err)
    assert "layers are kept" in said
    assert not (small_disk / "out").exists()
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    assert milo([*command, "--resume"]) == 0


def test_a_disk_that_may_only_be_read(small_model: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert milo(["quantize", str(small_model), "-o", str(small_disk / "out"), "--quiet"]) == 1
    assert f"{small_disk} may not be written to; choose another output" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("call", [2, 3])
def test_interrupts(number: int, status: int, call: int, sources: dict[str, Path], tmp_path: Path):
    """Real signals while layers are being quantized, the first and a later one, and again while one is written."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", _INTERRUPTED, str(sources["qwen3_moe"]), str(out), str(int(number)), str(call)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status, done.stderr
    assert not out.exists()
    last = done.stderr.splitlines()[-1]
    assert last.startswith("milo quantize: interrupted; ")
    if call == 2:
        assert last.endswith("; nothing was left behind")
        assert hidden(tmp_path) == []
    else:
        assert last.endswith(
            f"1 of 2 layers are kept in {tmp_path / '.out.partial'}; go on with the same command and --resume"
        )
        assert hidden(tmp_path) == [".out.partial"]


_INTERRUPTED = """
import os, signal, sys, threading, time
from vllm_milo.offline import convert
from vllm_milo.offline.cli import main
from vllm_milo.offline.durable import files
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit "ignore"
real = convert._by_layer  # at the beginning of each step, in the main thread; batches are read ahead in another
calls = []
def step(*arguments):
    calls.append(1)
    if len(calls) == int(sys.argv[4]):
        threading.Timer(0.3, os.kill, [os.getpid(), int(sys.argv[3])]).start()
        os.kill(os.getpid(), int(sys.argv[3]))
    return real(*arguments)
def save(*arguments, save_file=files.save_file, **options):
    time.sleep(1)
    save_file(*arguments, **options)
convert._by_layer, files.save_file = step, save
sys.exit(main(["quantize", sys.argv[1], "-o", sys.argv[2], "--calibration", "none", "--quiet", "--device", "cpu"]))
"""


def test_two_at_once(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The second ends before any work, also by another name of the folder."""
    (tmp_path / "link").symlink_to(tmp_path / "out")
    command = [sys.executable, "-m", "vllm_milo.offline.cli", "quantize", str(source), "-o", str(tmp_path / "link")]
    with Claim(tmp_path / "out", source):
        done = subprocess.run([*command, "--overwrite"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"{tmp_path / 'out'}: process {os.getpid()} is converting to it" in done.stderr
    assert hidden(tmp_path) == []
