"""Output folders: a checkpoint appears whole or not at all, and nothing that was there is lost."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from folder_edits import edit_tensors
from refusals import FAST, Q_PROJ, WEIGHTS, refused
from safetensors.torch import save_file

from vllm_milo.offline.checkpoint import writer
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.errors import ConversionError
from vllm_milo.validation import read_format, validate_checkpoint


def test_existing_output_is_kept(source: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("data")
    with pytest.raises(ConversionError, match="exists and is not empty; choose another or pass --overwrite"):
        convert(source, out, Conversion(FAST), progress=False)
    assert (out / "precious.txt").read_text() == "data"


def test_failure_keeps_the_output_that_was_to_be_replaced(source: Path, checkpoint: Path, tmp_path: Path):
    out = Path(shutil.copytree(checkpoint, tmp_path / "out"))
    edit_tensors(source, WEIGHTS, lambda tensors: tensors[Q_PROJ].fill_(float("nan")))
    with pytest.raises(ConversionError, match="NaN"):
        convert(source, out, Conversion(FAST, overwrite=True), progress=False)
    assert validate_checkpoint(out)


def test_overwrite_replaces(source: Path, checkpoint: Path, tmp_path: Path):
    out = Path(shutil.copytree(checkpoint, tmp_path / "out"))
    convert(source, out, Conversion(FAST, overwrite=True), progress=False)
    assert read_format(out)[1]["model_type"] == "mixtral"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_output_under_a_file(source: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match="cannot be written"):
        convert(source, tmp_path / "file" / "out", Conversion(FAST), progress=False)


def test_output_where_nobody_may_write(source: Path):
    with pytest.raises(ConversionError, match=r"/proc/milo/out: cannot be written"):
        convert(source, Path("/proc/milo/out"), Conversion(FAST), progress=False)


def test_full_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def full(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 3:
            Path(path).write_bytes(b"half a shard")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(writer, "save_file", full)
    refused(
        source, tmp_path / "out", "the disk is full .* nothing was left behind", Conversion(FAST, shard_bytes=50_000)
    )
    assert len(calls) == 3


def test_interrupt_leaves_nothing(sources: dict[str, Path], tmp_path: Path):
    """A real SIGINT while layers are being quantized."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", _INTERRUPTED, str(sources["qwen3_moe"]), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 130, done.stderr
    assert "interrupted; nothing was left behind" in done.stderr
    assert not out.exists()
    assert list(tmp_path.iterdir()) == []


_INTERRUPTED = """
import os, signal, sys
from vllm_milo.offline import convert
from vllm_milo.offline.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit "ignore"
real = convert.quantize_matrices
calls = []
def quantize(*arguments):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGINT)
    return real(*arguments)
convert.quantize_matrices = quantize
sys.exit(main(["quantize", sys.argv[1], "-o", sys.argv[2], "--max-rounds", "1", "--quiet", "--device", "cpu"]))
"""
