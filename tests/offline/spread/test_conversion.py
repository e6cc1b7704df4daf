"""Conversions in pieces of any size and on several devices: the same files, and the same ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import VOCABULARY

from vllm_milo.offline.cli import main as milo
from vllm_milo.offline.conversion import Conversion, Text
from vllm_milo.offline.convert import convert
from vllm_milo.offline.errors import ConversionError, PassingError
from vllm_milo.offline.learn.layer import LearnOptions
from vllm_milo.offline.nouns import Recipe
from vllm_milo.offline.ranks.policies import parse_policies
from vllm_milo.offline.source.parts import Part
from vllm_milo.offline.source.reader import ModelReader
from vllm_milo.offline.spread import job
from vllm_milo.offline.spread.remote import Remote

WINDOWS = torch.randint(0, VOCABULARY, (6, 48), generator=torch.Generator().manual_seed(0))
TEXT = Text("random", WINDOWS, LearnOptions(steps=2, batch=2))
WAYS = {
    "hqq": Conversion(Recipe("hqq", 64)),
    "paper": Conversion(Recipe("paper", 64, max_rounds=2), parse_policies("uniform=16")),
    "fast": Conversion(Recipe("milo", 64, max_rounds=3, base="hqq"), parse_policies("dense=16,sparse=8")),
    "text": Conversion(Recipe("milo", 64, max_rounds=1, feedback_rounds=1), budget_bits=4.2, text=TEXT),
}
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def converted(source: Path, out: Path, conversion: Conversion, **changes) -> dict[str, bytes]:
    return content(convert(source, out, replace(conversion, **changes), progress=False).out)


@pytest.mark.parametrize("way", WAYS)
def test_several_devices_give_the_bytes_of_one(
    way: str, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    elsewhere, real = [], Remote.receive
    monkeypatch.setattr(Remote, "receive", lambda self: elsewhere.append(self) or real(self))
    alone = converted(sources["qwen2_moe"], tmp_path / "alone", WAYS[way])
    assert not elsewhere
    assert converted(sources["qwen2_moe"], tmp_path / "spread", WAYS[way], more_devices=("cpu", "cpu")) == alone
    assert len(set(elsewhere)) == 2


@pytest.mark.parametrize("way", ["hqq", "paper", "fast"])
def test_pieces_of_any_size_give_the_bytes_of_the_whole(way: str, small_model: Path, tmp_path: Path):
    """On CPUs, where a matrix alone is solved as it is among others."""
    conversion = replace(WAYS[way], recipe=replace(WAYS[way].recipe, max_rounds=1))
    whole = converted(small_model, tmp_path / "whole", conversion)
    for size in (5, 7, 12):  # MiB; the largest matrix takes 3
        assert converted(small_model, tmp_path / str(size), conversion, device_memory=size * 2**20) == whole


@pytest.mark.parametrize("more", [(), ("cpu",)])
def test_an_error_in_the_last_layer_leaves_what_errors_leave(
    more: tuple[str, ...], sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In the thread that reads: finished layers stay where trying again may help, and the rest gives the same bytes."""
    source, conversion = sources["qwen3_moe"], replace(WAYS["fast"], more_devices=more)
    last = next(s.tensor for layer in ModelReader(source).layers[::-1] for s in layer.matrices)
    whole = converted(source, tmp_path / "whole", conversion)
    broken, real = tmp_path / "broken.safetensors", ModelReader.part
    save_file({last: torch.full_like(ModelReader(source).load(last), float("nan"))}, broken)
    for file, kind, said in (
        (tmp_path / "gone.safetensors", PassingError, "cannot read tensor"),
        (broken, ConversionError, "holds NaN or Inf"),
    ):

        def part(self, of, file=file):
            return Part(file, last) if of.tensor == last else real(self, of)

        with monkeypatch.context() as patch:
            patch.setattr(ModelReader, "part", part)
            with pytest.raises(kind, match=rf"{re.escape(str(file))}: .*{said}|tensor {re.escape(last)} {said}"):
                convert(source, tmp_path / "out", replace(conversion, resume=False), progress=False)
        kept = kind is PassingError
        assert (tmp_path / ".out.partial").is_dir() == kept
        if kept:
            assert converted(source, tmp_path / "out", conversion, resume=True) == whole
            (tmp_path / "out").rename(tmp_path / "resumed")


def test_less_memory_goes_on_with_the_batches_of_before_where_they_fit(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    conversion = replace(WAYS["hqq"], device_memory=7 * 2**20, shard_bytes=100_000)
    real, sizes = job.quantize_matrices, []
    monkeypatch.setattr(job, "quantize_matrices", lambda w, *a: sizes.append(w.numel()) or real(w, *a))
    whole = converted(small_model, tmp_path / "whole", conversion)
    left = len(sizes)

    def fail(*arguments):
        nonlocal left
        left -= 1
        if not left:
            raise RuntimeError("a defect")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(job, "quantize_matrices", fail)
        with pytest.raises(RuntimeError, match="a defect"):
            convert(small_model, tmp_path / "out", conversion, progress=False)
    with pytest.raises(ConversionError, match=r"batch_weights was 131072 and is 65536"):
        convert(small_model, tmp_path / "out", replace(conversion, resume=True, device_memory=2**22), progress=False)
    sizes.clear()
    assert converted(small_model, tmp_path / "out", conversion, resume=True, device_memory=None) == whole
    assert max(sizes) == 131072


def test_too_little_memory_is_said_before_the_work(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ModelReader, "load", lambda self, tensor: pytest.fail(f"{tensor} was read"))
    command = ["quantize", str(small_model), "-o", str(tmp_path / "out"), "--preset", "fast", "--device", "cpu"]
    assert milo([*command, "--device-memory", "0.001"]) == 1
    said = capsys.readouterr().err
    assert re.search(
        r"model\.layers\.\d\.\S+: quantizing its \[\d+, \d+\] weights takes 0\.\d\d GiB of memory, and --device-memory "
        r"allows 0\.00 GiB; allow more, use another device, or keep this layer unquantized \(--ignore\)",
        said,
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices", "cpu,cuda:0"], "--devices cpu,cuda:0|--device cuda:0"),
        (["--devices", "cpu,,cpu"], "argument --devices: is empty"),
        (["--devices", "cpu", "--device", "cpu:0"], "not allowed with argument"),
        (["--device-memory", "0"], "--device-memory 0: must be a number of GiB above 0"),
        (["--device-memory", "nan"], "--device-memory nan: must be a number of GiB above 0"),
        (["--devices", "cpu,tpu"], "--device tpu: torch knows no such device"),
    ],
)
def test_bad_options(
    options: list[str], message: str, small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    try:
        status = milo(["quantize", str(small_model), "-o", str(tmp_path / "out"), *options])
    except SystemExit as end:
        status = end.code
    assert status in (1, 2)
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


_INTERRUPTED = """
import os, signal, sys, threading
from vllm_milo.offline.cli import main
from vllm_milo.offline.spread import remote
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit "ignore"
real = remote.Remote.receive
_, source, output, number = sys.argv
def receive(self):  # several times in threads, the last after the end of the command perhaps
    print("process", self._process.pid, flush=True)
    threading.Timer(0.05, os.kill, [os.getpid(), int(number)]).start()
    return real(self)
remote.Remote.receive = receive
sys.argv = ["milo", "quantize", source, "-o", output, "--preset", "fast", "--max-rounds", "40", "--quiet"]
sys.argv += ["--devices", "cpu,cpu"]
sys.exit(main())  # the command of the process, which ends undisturbed by what the other timers send
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupts_end_all_processes(number: int, status: int, small_model: Path, tmp_path: Path):
    command = [sys.executable, "-c", _INTERRUPTED, str(small_model), str(tmp_path / "out"), str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status, done.stderr
    assert done.stderr.splitlines()[-1].startswith("milo quantize: interrupted; ")
    # Python drops an interrupt that comes while it runs a weak reference's callback, and says so with a traceback
    said = re.sub(r"Exception ignored in: .*\nTraceback .*(\n .*)*\nKeyboardInterrupt: ?\n", "", done.stderr)
    assert "Traceback" not in said
    (process,) = set(re.findall(r"process (\d+)", done.stdout))
    with pytest.raises(ProcessLookupError):
        os.kill(int(process), 0)
    assert not (tmp_path / "out").exists()


def test_a_kill_ends_all_processes(small_model: Path, tmp_path: Path):
    command = [sys.executable, "-c", _INTERRUPTED, str(small_model), str(tmp_path / "out"), str(int(signal.SIGKILL))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    (process,) = set(re.findall(r"process (\d+)", done.stdout))
    status, end = Path(f"/proc/{process}/status"), time.monotonic() + 60
    while status.exists() and "State:\tZ" not in status.read_text():  # nobody may be there to wait for it
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("way", WAYS)
def test_two_gpus_give_the_bytes_of_one(way: str, sources: dict[str, Path], tmp_path: Path):
    first = converted(sources["qwen2_moe"], tmp_path / "first", WAYS[way], device="cuda:0")
    both = converted(sources["qwen2_moe"], tmp_path / "both", WAYS[way], device="cuda:0", more_devices=("cuda:1",))
    assert both == first
    assert converted(sources["qwen2_moe"], tmp_path / "second", WAYS[way], device="cuda:1") == first


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["hqq", "paper", "fast"])
def test_memory_that_suffices_changes_nothing_on_a_gpu(way: str, small_model: Path, tmp_path: Path):
    whole = converted(small_model, tmp_path / "whole", WAYS[way], device="cuda")
    assert converted(small_model, tmp_path / "less", WAYS[way], device="cuda", device_memory=13 * 2**30) == whole
    small = converted(small_model, tmp_path / "small", WAYS[way], device="cuda", device_memory=2**25)
    again = converted(small_model, tmp_path / "again", WAYS[way], device="cuda", device_memory=2**25)
    assert small == again
