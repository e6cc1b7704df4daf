"""The source's other files: what comes along, and what stays."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from refusals import FAST

from vllm_milo.offline.checkpoint.companions import find_companions
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.evaluation.verify import verify_checkpoint
from vllm_milo.offline.planning.plan import make_plan
from vllm_milo.offline.source.reader import ModelReader


def write(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_folders_come_along(source: Path, tmp_path: Path):
    kept = ["additional_chat_templates/tool_use.jinja", "code/deep/modeling.py", "LICENSE", "vocab.json"]
    left = [
        *(f"other/weights.{end}" for end in ("bin", "pt", "pth", "gguf", "onnx", "safetensors", "h5", "BIN")),
        *(".git/config", "code/.hidden", "code/__pycache__/modeling.pyc", "other/pytorch_model.bin.index.json"),
    ]
    for name in (*kept, *left):
        write(source / name)
    out = convert(source, tmp_path / "out", Conversion(FAST), progress=False).out
    held = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert set(kept) <= held
    assert not set(left) & held
    verdict = verify_checkpoint(out)
    assert verdict.good, verdict.problems
    write(out / kept[0], "y")
    assert "additional_chat_templates/tool_use.jinja" in verify_checkpoint(out).problems[0]


def test_links_are_followed_in_the_model_alone(source: Path, tmp_path: Path):
    secret = write(tmp_path / "secret.txt")
    (source / "stolen.txt").symlink_to(secret)
    (source / "folder").symlink_to(tmp_path)
    write(source / "real.txt")
    (source / "alias.txt").symlink_to("real.txt")
    (source / "gone.txt").symlink_to("nowhere")
    summary = convert(source, tmp_path / "out", Conversion(FAST), progress=False)
    held = {path.name for path in summary.out.iterdir()}
    assert {"real.txt", "alias.txt"} <= held
    assert not {"stolen.txt", "folder", "gone.txt"} & held
    assert sum("is not copied: it is a link to" in warning for warning in summary.warnings) == 2
    assert any(f"stolen.txt: is not copied: it is a link to {secret}" in warning for warning in summary.warnings)


def test_links_of_the_hubs_cache(source: Path, tmp_path: Path):
    """There every file is a link from ``snapshots`` to ``blobs``."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    shutil.copytree(source, snapshot)
    blob = write(blobs / "89ab")
    (snapshot / "templates").mkdir()
    (snapshot / "merges.txt").symlink_to(Path("../../blobs/89ab"))
    (snapshot / "templates" / "a.jinja").symlink_to(Path("../../../blobs/89ab"))
    found = find_companions(snapshot)
    assert found.files["merges.txt"] == found.files["templates/a.jinja"] == blob.resolve()
    assert found.warnings == []


def test_what_cannot_come_along_is_named(source: Path, tmp_path: Path):
    """And what comes along leaves a checkpoint that verify finds good."""
    (source / "vocab.txt").symlink_to("nowhere")
    os.mkfifo(source / "notes.txt")
    os.mkfifo(source / "README.md")
    for name in ("a\nb.txt", "a\\b.txt", "\x1b[31m.txt", "\udcff.txt", "README.md.d/x", "milo_report.json/x"):
        write(source / name)
    summary = convert(source, tmp_path / "out", Conversion(FAST), progress=False)
    said = "\n".join(summary.warnings)
    for name, why in {
        "vocab.txt": "it leads to nowhere, which is not there",
        "notes.txt": "it is a pipe, a socket or a device",
        "README.md": "it is a pipe, a socket or a device",
        "a\\nb.txt'": "no manifest can list its name",
        "a\\b.txt": "no manifest can list its name",
        "\\x1b[31m.txt'": "no manifest can list its name",
        "\\udcff.txt'": "no manifest can list its name",
        "milo_report.json/x": "the checkpoint has a file where this has a folder",
    }.items():
        assert f"{name}: is not copied: {why}" in said
    assert (summary.out / "README.md.d" / "x").exists()
    assert verify_checkpoint(summary.out).good


def test_two_files_of_one_name_in_the_checkpoint(source: Path):
    write(source / "README_SOURCE.md")
    assert find_companions(source).warnings == []
    write(source / "README.md")
    found = find_companions(source)
    assert found.files["README_SOURCE.md"] == source / "README.md"
    assert found.warnings == [f"{source / 'README_SOURCE.md'}: is not copied: the source's README.md gets this name"]


def test_a_path_that_is_too_long(source: Path):
    deep, descriptor = "d" * 200, os.open(source, os.O_RDONLY)
    for _ in range(25):
        os.mkdir(deep, dir_fd=descriptor)
        descriptor, before = os.open(deep, os.O_RDONLY, dir_fd=descriptor), descriptor
        os.close(before)
    os.close(os.open("file.txt", os.O_CREAT, dir_fd=descriptor))
    os.close(descriptor)
    said = find_companions(source).warnings
    assert len(said) == 1
    assert (
        "is not copied: its path is too long" in said[0] or "the folder cannot be read: File name too long" in said[0]
    )


def test_a_file_that_nobody_may_read_is_refused_from_the_headers(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hidden, access = write(source / "merges.txt"), os.access  # the superuser may read all, so this is played
    monkeypatch.setattr(os, "access", lambda path, mode, **more: Path(path) != hidden and access(path, mode, **more))
    with pytest.raises(ConversionError, match=r"merges\.txt: cannot be read: Permission denied; make it readable"):
        make_plan(ModelReader(source), tmp_path / "out", Conversion(FAST))


def test_files_may_be_read_by_whom_the_user_lets_read_them(source: Path, tmp_path: Path):
    """The library that writes weights leaves them to their owner, and who serves a checkpoint may be somebody else."""
    out = convert(source, tmp_path / "out", Conversion(FAST), progress=False).out
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {write(tmp_path / "new").stat().st_mode & 0o777}
