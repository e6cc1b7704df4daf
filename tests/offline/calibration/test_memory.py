"""What memory a conversion takes: said before, refused where it is too much, and advice where it runs out."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import VOCABULARY

from vllm_milo.offline import convert as converter
from vllm_milo.offline.along import layers as along_text
from vllm_milo.offline.calibration import choose, memory
from vllm_milo.offline.cli import main
from vllm_milo.offline.conversion import Conversion, Text
from vllm_milo.offline.convert import convert
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.learn.end_to_end import TuneOptions
from vllm_milo.offline.learn.layer import LearnOptions
from vllm_milo.offline.nouns import Recipe
from vllm_milo.offline.planning import disk
from vllm_milo.offline.planning.pieces import solver_weights
from vllm_milo.offline.planning.plan import predict_memory
from vllm_milo.offline.source.reader import ModelReader

WINDOWS = torch.randint(0, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(0))
ALONG = Conversion(Recipe(max_rounds=1), text=Text("random", WINDOWS, LearnOptions(steps=1, batch=2)))


def quantize(source: Path, out: Path, *options: str) -> int:
    few = ["--calibration-windows", "8", "--learn-steps", "1", "--max-rounds", "1", "--device", "cpu"]
    return main(["quantize", str(source), "-o", str(out), *few, *options])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_grows_with_the_text_and_the_largest_layer(sources: dict[str, Path], device: str):
    reader = ModelReader(sources["qwen2_moe"])
    needs = [memory.streamed_need(reader, tokens, device) for tokens in (0, 1000, 2000)]
    states = memory.STREAMS * 1000 * 128 * (4 if device == "cpu" else 2)
    assert needs[1] - needs[0] == pytest.approx(memory.SLACK * states, abs=2)
    assert needs[2] - needs[1] == pytest.approx(memory.SLACK * states, abs=2)
    largest = max(sum(s.matrix.n * s.matrix.k for s in layer.matrices) for layer in reader.layers)
    assert needs[0] > memory.LATENT_BYTES * largest
    both = sum(layer.weights for layer in reader.layers)
    assert memory.tuning_need(reader, device) > memory.LATENT_BYTES * both  # not of the larger layer alone


def test_the_windows_that_fit_do_fit_and_one_more_does_not(sources: dict[str, Path]):
    reader = ModelReader(sources["mixtral"])
    have = memory.streamed_need(reader, 100_000, "cpu")
    fit = memory.windows_that_fit(reader, 48, have, "cpu")
    assert memory.streamed_need(reader, fit * 48, "cpu") <= have < memory.streamed_need(reader, (fit + 1) * 48, "cpu")
    assert memory.windows_that_fit(reader, 48, 2**20, "cpu") == 0


def test_too_little_memory_is_refused_with_what_fits(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr(choose, "WINDOW", 32)
    monkeypatch.setattr(disk, "free_bytes", lambda out: None)  # which hidden states could go to otherwise
    reader, out = ModelReader(small_model), tmp_path / "out"
    for tokens, advice in ((5 * 32, "use --calibration-windows 5, which should fit"), (-1, "not one window fits")):
        have = memory.streamed_need(reader, tokens, "cpu", memory.Layout(rounds=16))  # as many as there are experts
        with monkeypatch.context() as patch:
            patch.setattr(memory, "available", lambda device, have=have: have)
            assert quantize(small_model, out) == 1
            error = capsys.readouterr().err
            assert re.search(
                r"converting with a calibration text takes (at least )?0\.\d\d GiB on cpu, .*and 0\.\d\d GiB are", error
            )
            assert advice in error
            assert "--calibration none needs least" in error
            assert not out.exists()
            for options in (("--calibration-windows", "5"), ("--calibration", "none")):
                if tokens > 0 or "none" in options:
                    assert quantize(small_model, out, "--overwrite", *options) == 0
        out.rename(tmp_path / str(tokens))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't")]
)
def test_running_out_of_memory_names_half_of_the_windows(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(along_text, "learn_layer", fail)
    with pytest.raises(ConversionError, match="cpu: out of memory; use --calibration-windows 4, which should fit"):
        convert(sources["mixtral"], tmp_path / "out", ALONG, progress=False)
    monkeypatch.setattr(converter, "load_batches", fail)
    with pytest.raises(ConversionError, match="cpu: out of memory; use another --device"):
        convert(sources["mixtral"], tmp_path / "out", Conversion(Recipe(max_rounds=1)), progress=False)
    assert not list(tmp_path.iterdir())


def test_other_errors_stay_what_they_are(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_, **__):
        raise RuntimeError("something else")

    monkeypatch.setattr(along_text, "learn_layer", fail)
    with pytest.raises(RuntimeError, match="something else"):
        convert(sources["mixtral"], tmp_path / "out", ALONG, progress=False)


def test_a_model_that_runs_out_of_memory_while_it_writes(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(choose, "write_windows", fail)
    assert quantize(small_model, tmp_path / "out", "--calibration", "self") == 1
    assert "--calibration self: cpu ran out of memory while the model wrote; use the text" in capsys.readouterr().err


def test_memory_is_said_before_and_after(small_model: Path, tmp_path: Path, capsys):
    said = {}
    for how in ("none", "text"):
        assert quantize(small_model, tmp_path / how, "--calibration", how) == 0
        captured = capsys.readouterr()
        [line] = [line for line in captured.err.splitlines() if line.startswith("memory: ")]
        found = re.fullmatch(r"memory: up to about (\d+\.\d\d) GiB of host memory \(\d+\.\d\d GiB free\)", line)
        said[how] = float(found[1])
        assert captured.err.index("memory: ") < captured.err.index("quantize: ")
        assert re.search(r"peak \d+\.\d\d GiB of host memory\n", captured.out)
    assert 0.3 < said["none"] < said["text"] < 2
    assert quantize(small_model, tmp_path / "out", "--quiet") == 0
    assert "memory: " not in capsys.readouterr().err


def test_the_device_and_the_host_are_told_apart(sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    reader = ModelReader(sources["mixtral"])
    on_cpu, on_gpu = (memory.whole_need(reader, 5 * 2**30, device, 2**20) for device in ("cpu", "cuda:0"))
    assert on_cpu.device == 0
    assert on_cpu.host > 5 * 2**30
    assert on_gpu.device == 5 * 2**30
    assert on_gpu.host == on_cpu.host - 5 * 2**30 + memory.HOST_BASE["cuda"] - memory.HOST_BASE["cpu"]
    monkeypatch.setattr(memory, "available", lambda device: (8 if device == "cpu" else 80) * 2**30)
    assert "5.00 GiB on cuda:0 (80.00 GiB free) and 3." in on_gpu.line("cuda:0")
    assert on_gpu.line("cuda:0").endswith("GiB of host memory (8.00 GiB free)")


def test_the_processes_of_further_devices_count(sources: dict[str, Path]):
    reader, conversion = ModelReader(sources["mixtral"]), replace(ALONG, text=None)
    one, three = (predict_memory(reader, replace(conversion, more_devices=more)).host for more in ((), ("cpu", "cpu")))
    batch = solver_weights([torch.device("cpu")], None)
    assert three - one == 2 * memory.process_need(reader, batch, "cpu") > 2 * memory.HOST_BASE["cpu"]
    whole = max(sum(source.matrix.n * source.matrix.k for source in layer.matrices) for layer in reader.layers)
    assert memory.process_need(reader, 2**40, "cuda:1") >= memory.HOST_BASE["cuda"] + 4 * whole
    assert memory.process_need(reader, 64, "cuda:1") == memory.HOST_BASE["cuda"] + 4 * 64


def test_training_the_whole_model_is_foretold(sources: dict[str, Path]):
    tuned = Conversion(ALONG.recipe, text=Text("random", WINDOWS, LearnOptions(), TuneOptions(steps=1)))
    reader = ModelReader(sources["olmoe"])
    needs = [predict_memory(reader, conversion).host for conversion in (ALONG, tuned)]
    expected = memory.tuning_need(reader, "cpu") - memory.streamed_need(reader, WINDOWS.numel(), "cpu")
    assert needs[1] - needs[0] == expected > 0


@pytest.mark.parametrize(("name", "message"), [("cuda:99", "torch sees"), ("gpu", "torch knows no such device")])
def test_devices_that_are_not_there(small_model: Path, tmp_path: Path, capsys, name: str, message: str):
    for options in ((), ("--preset", "best"), ("--calibration", "self"), ("--calibration", "none")):
        assert quantize(small_model, tmp_path / "out", *options, "--device", name) == 1
        assert f"--device {name}: {message}" in capsys.readouterr().err
