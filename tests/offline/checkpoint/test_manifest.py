"""The manifest of a checkpoint: what it names, when it is written, and what is refused as one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from refusals import FAST

from vllm_milo.checkpoint import CheckpointError
from vllm_milo.offline.checkpoint import manifest, writer
from vllm_milo.offline.checkpoint.manifest import MANIFEST_NAME, read_manifest
from vllm_milo.offline.checkpoint.writer import CheckpointWriter
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.shards import ShardError


def test_it_names_every_other_file_but_the_card(bundled_model: Path, tmp_path: Path):
    out = convert(bundled_model, tmp_path / "out", Conversion(FAST, shard_bytes=500_000), progress=False).out
    files = json.loads((out / MANIFEST_NAME).read_text())["files"]
    assert list(files) == sorted(path.name for path in out.iterdir() if path.name not in (MANIFEST_NAME, "README.md"))
    assert {"config.json", "milo_report.json", "tokenizer.json", "model.safetensors.index.json"} <= files.keys()
    assert sum(name.endswith(".safetensors") for name in files) > 3
    for name, entry in files.items():
        content = (out / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_it_is_written_last_and_each_shard_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    events = []
    for module, name in ((writer, "describe_file"), (manifest, "describe_file"), (writer, "_write_json")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda p, *a, r=real, n=name: events.append((n, p.name)) or r(p, *a))
    source = tmp_path / "source"
    source.mkdir()
    (source / MANIFEST_NAME).write_text("of something else")
    with CheckpointWriter(tmp_path / "out", source, shard_bytes=64) as writing:
        for name in "ab":
            writing.add(name, torch.zeros(32))
        writing.seal({"model_type": "mixtral"}, {"milo.json": {}})
        out = writing.publish()
    assert events[-2:] == [("_write_json", MANIFEST_NAME), ("describe_file", MANIFEST_NAME)]
    assert [name for event, name in events if event == "_write_json"][-2] == "config.json"
    read = [name for event, name in events if event == "describe_file"]
    assert read[:2] == ["model-00001.safetensors", "model-00002.safetensors"]
    assert read[2:] == ["config.json", "milo.json", "model.safetensors.index.json", MANIFEST_NAME]
    assert list(read_manifest(out)) == sorted({path.name for path in out.iterdir()} - {MANIFEST_NAME})


def test_nothing_of_the_machine_is_in_it(sources: dict[str, Path], tmp_path: Path):
    elsewhere = shutil.copytree(sources["mixtral"], tmp_path / "a" / "model")
    folders = [
        convert(source, out, Conversion(FAST), progress=False).out
        for source, out in ((sources["mixtral"], tmp_path / "one"), (elsewhere, tmp_path / "b" / "two"))
    ]
    first, second = ((folder / MANIFEST_NAME).read_text() for folder in folders)
    assert first == second
    assert os.sep not in first


GOOD = {"size": 3, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"format_version": 2, "files": {}}, "format_version 2; known is 1, update vllm-milo"),
        ([], "format_version is None"),
        ({"format_version": 1}, "'files'"),
        ({"format_version": 1, "files": []}, "no manifest of a MiLo checkpoint"),
        ({"format_version": 1, "files": {"../secret": GOOD}}, "'../secret' is no file name"),
        ({"format_version": 1, "files": {"/etc/passwd": GOOD}}, "'/etc/passwd' is no file name"),
        ({"format_version": 1, "files": {"..": GOOD}}, "'..' is no file name"),
        ({"format_version": 1, "files": {"a": GOOD | {"size": "3"}}}, "size and sha256 of a are '3'"),
        ({"format_version": 1, "files": {"a": GOOD | {"sha256": "0"}}}, "size and sha256 of a are 3 and '0'"),
        ({"format_version": 1, "files": {"a": {"size": 3}}}, "'sha256'"),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, content, message: str):
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"{MANIFEST_NAME}: .*{message}"):
        read_manifest(tmp_path)


def test_a_manifest_that_is_cut(tmp_path: Path):
    (tmp_path / MANIFEST_NAME).write_text('{"format_version"')
    with pytest.raises(ShardError, match=rf"{MANIFEST_NAME}: not valid JSON"):
        read_manifest(tmp_path)
