"""The lock of an output: one holder, gone with its process, and no trace."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_milo.offline.durable.lock import OutputLock
from vllm_milo.offline.errors import ConversionError


def test_one_holder_and_no_trace(tmp_path: Path):
    out = tmp_path / "new" / "folder" / "out"
    with OutputLock(out):
        with pytest.raises(ConversionError, match=f"{out}: process {os.getpid()} is converting to it"), OutputLock(out):
            pass
        assert [path.name for path in out.parent.iterdir()] == [".out.milo-lock"]
        with OutputLock(out.with_name("other")):
            pass
    assert list(tmp_path.iterdir()) == []


def test_it_dies_with_its_process(tmp_path: Path):
    code = (
        "import sys, time; from pathlib import Path; from vllm_milo.offline.durable.lock import OutputLock\n"
        "with OutputLock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ConversionError, match=f"process {holder.pid} is converting"), OutputLock(tmp_path / "out"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert (tmp_path / ".out.milo-lock").exists()
    with OutputLock(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_its_holder_deletes_meanwhile_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The holder lets go between the opening and the locking of another."""
    path, real, calls = tmp_path / ".out.milo-lock", fcntl.flock, []

    def flock(descriptor: int, how: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            path.unlink()
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with OutputLock(tmp_path / "out"):
        assert len(calls) == 2
        assert path.read_text() == str(os.getpid())


def test_links_are_not_followed(tmp_path: Path):
    (tmp_path / "precious.txt").write_text("data")
    (tmp_path / ".out.milo-lock").symlink_to(tmp_path / "precious.txt")
    with (
        pytest.raises(ConversionError, match=r"out: cannot be written: .*\.out\.milo-lock"),
        OutputLock(tmp_path / "out"),
    ):
        pass
    assert (tmp_path / "precious.txt").read_text() == "data"


def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def flock(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with OutputLock(tmp_path / "out") as lock:
        (note,) = lock.notes
    assert "has no locks (No locks available); see to it that no other process writes to" in note
    assert list(tmp_path.iterdir()) == []
