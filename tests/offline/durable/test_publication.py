"""A folder gets its name, and what had it before is never lost on the way."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vllm_milo.offline.durable import publication
from vllm_milo.offline.durable.exchange import exchange
from vllm_milo.offline.durable.publication import publish


def folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path, Path]:
    return folder(tmp_path / "new", "new"), folder(tmp_path / "out", "old"), tmp_path / "replaced"


def test_two_folders_change_places(places):
    new, out, _ = places
    if not exchange(new, out):
        pytest.skip("the system cannot")
    assert ((out / "file").read_text(), (new / "file").read_text()) == ("new", "old")


def test_what_cannot_be_exchanged_is_an_error(places, tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "absent", places[1])


@pytest.mark.parametrize("can", [True, False])
def test_an_old_folder_is_replaced(places, monkeypatch: pytest.MonkeyPatch, can: bool):
    new, out, replaced = places
    if not can:
        monkeypatch.setattr(publication, "exchange", lambda *_: False)
    publish(new, out, replaced)
    assert (out / "file").read_text() == "new"
    assert ((new if can else replaced) / "file").read_text() == "old"


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_the_old_folder_comes_back_if_the_rename_fails(places, monkeypatch: pytest.MonkeyPatch, error: BaseException):
    new, out, replaced = places
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if source == new:
            raise error
        real(source, target)

    monkeypatch.setattr(publication, "exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(type(error)):
        publish(new, out, replaced)
    assert ((out / "file").read_text(), (new / "file").read_text()) == ("old", "new")
