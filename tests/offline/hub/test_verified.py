"""Weights in the Hub's cache are compared with the Hub's SHA-256 once, and again when they may be others."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import COMMIT, HubServer, of_folder

from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.hub import download, files
from vllm_milo.offline.hub.listing import look_up
from vllm_milo.offline.hub.verified import FOLDER
from vllm_milo.offline.hub_names import ModelName

NAME, WEIGHTS = "org/tiny", "model.safetensors"
CONTENT = bytes(range(256)) * 64
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def get(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Downloads a model, or takes it from the cache; returns how many files were read to be compared."""
    source = tmp_path / "source"
    source.mkdir()
    (source / WEIGHTS).write_bytes(CONTENT)
    (source / "config.json").write_text("{}")
    hub.repositories[NAME] = of_folder(source)
    read: list[Path] = []
    real = files._read
    monkeypatch.setattr(files, "_read", lambda path, arrived: read.append(path) or real(path, arrived))

    def run() -> int:
        read.clear()
        download.download(look_up(ModelName(NAME, None)))
        return len(read)

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The model's folder of the cache."""
    return tmp_path / "cache" / "models--org--tiny"


def weights(model: Path) -> Path:
    return (model / "snapshots" / COMMIT / WEIGHTS).resolve()


def test_unchanged_weights_are_read_once(get: Callable[[], int], model: Path):
    assert [get(), get(), get()] == [1, 0, 0]
    assert [path.name for path in (model / FOLDER).iterdir()] == [SHA256]
    shutil.rmtree(model / FOLDER)
    assert [get(), get()] == [1, 0]


def test_what_changed_is_read_again(get: Callable[[], int], model: Path):
    """Also where size and time are those of before, as after a copy."""
    get()
    path = weights(model)
    os.utime(path, ns=(0, 0))
    assert [get(), get()] == [1, 0]
    path.write_bytes(CONTENT[:-1] + b"\0")
    os.utime(path, ns=(0, 0))
    for _ in range(2):  # what is damaged has no mark either
        with pytest.raises(ConversionError, match="in the Hub's cache is damaged"):
            get()
    path.unlink()
    path.write_bytes(CONTENT)
    assert [get(), get()] == [1, 0]


@pytest.mark.parametrize("content", [b"", b"[16384, 0, 0]", b"[" * 10**5, b"\xff\xfe\0"])
def test_damaged_marks_count_for_nothing(get: Callable[[], int], model: Path, content: bytes):
    get()
    (model / FOLDER / SHA256).write_bytes(content)
    assert [get(), get()] == [1, 0]


def test_caches_that_may_not_be_written_to(get: Callable[[], int], model: Path):
    """Their files are read each time."""
    get()
    shutil.rmtree(model / FOLDER)
    (model / FOLDER).write_bytes(b"")  # no folder can be made
    assert [get(), get()] == [1, 1]


def test_what_changes_while_it_is_read_has_no_mark(
    get: Callable[[], int], model: Path, monkeypatch: pytest.MonkeyPatch
):
    real = files._read

    def touched(path: Path, arrived: files.Arrived) -> str:
        found = real(path, arrived)
        os.utime(path, ns=(0, 0))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(files, "_read", touched)
        get()
    assert not (model / FOLDER).exists()
    assert [get(), get()] == [1, 0]
