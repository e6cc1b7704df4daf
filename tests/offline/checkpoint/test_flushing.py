"""A checkpoint is on the disk before it gets its name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from vllm_milo.offline.checkpoint.writer import CheckpointWriter


def test_files_and_folder_are_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flushed: set[Path] = set()
    unflushed: list[set[Path]] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        flushed.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    def rename(source: Path | str, target: Path | str, **options: int) -> None:
        if Path(target) == out:
            unflushed.append({Path(source), *Path(source).rglob("*")} - flushed)
        real_rename(source, target, **options)

    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    with CheckpointWriter(out, source, shard_bytes=64) as writer:
        for name in "ab":
            writer.add(name, torch.zeros(32))
        writer.seal({"model_type": "mixtral"}, {"milo.json": {}})
        writer.publish()
    assert unflushed == [set()]
    assert {path.name for path in out.iterdir()} >= {"config.json", "tokenizer.json", "milo.json"}
