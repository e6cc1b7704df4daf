"""What killed conversions left at an output, of this version and the one before."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from refusals import FAST

from vllm_milo.offline.checkpoint.claim import Claim
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.errors import ConversionError


@pytest.fixture
def dead() -> int:
    """The number of a process that is dead."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_checkpoint_that_was_moved_away_comes_back(source: Path, checkpoint: Path, tmp_path: Path, dead: int):
    out = tmp_path / "out"
    for name in (".out.replaced", f".out.partial-{dead}.replaced"):
        shutil.copytree(checkpoint, tmp_path / name)
        with pytest.raises(ConversionError, match="exists and is not empty"), Claim(out, source):
            pass
        assert (out / "config.json").exists()
        assert not (tmp_path / name).exists()
        shutil.rmtree(out)


def test_a_checkpoint_that_was_moved_away_is_kept_beside_another(source: Path, checkpoint: Path, tmp_path: Path):
    out = Path(shutil.copytree(checkpoint, tmp_path / "out"))
    shutil.copytree(checkpoint, tmp_path / ".out.replaced")
    with Claim(out, source, overwrite=True) as claim:
        assert claim.notes == [
            f"{tmp_path / '.out.replaced'}: a checkpoint that a killed conversion moved away from {out}"
        ]
    assert (tmp_path / ".out.replaced" / "config.json").exists()


def test_leftovers_of_the_version_before(source: Path, tmp_path: Path, dead: int):
    """Those of living processes stay; those of dead ones are named, and go with --overwrite."""
    out = tmp_path / "out"
    (tmp_path / f".out.partial-{dead}").mkdir()
    (tmp_path / f".out.partial-{os.getpid()}").mkdir()
    (tmp_path / ".out.partial-mine").mkdir()
    with Claim(out, source) as claim:
        assert len(claim.notes) == 2
        assert any("older version; delete it" in note for note in claim.notes)
        assert any(f"process {os.getpid()} may still write to it" in note for note in claim.notes)
    with Claim(out, source, overwrite=True):
        left = {path.name for path in tmp_path.iterdir() if ".partial" in path.name}
    assert left == {f".out.partial-{os.getpid()}", ".out.partial-mine"}


def test_a_kill_between_publication_and_its_end(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The checkpoint is whole: going on has nothing to do, and a new conversion deletes what is left."""
    out, conversion = tmp_path / "out", Conversion(FAST)
    monkeypatch.setattr("vllm_milo.offline.checkpoint.writer.discard", lambda _: None)
    first = convert(source, out, conversion, progress=False)
    monkeypatch.undo()
    assert (tmp_path / ".out.partial" / "sealed.json").exists()
    kept = shutil.copytree(tmp_path / ".out.partial", tmp_path / "copy")
    changed = out.stat().st_mtime_ns
    again = convert(source, out, Conversion(FAST, resume=True), progress=False)
    assert again._replace(seconds=0, warnings=[], peak_host_bytes=0) == first._replace(
        seconds=0, warnings=[], peak_host_bytes=0
    )
    assert again.warnings == [f"{out}: was complete when its conversion was killed"]
    assert out.stat().st_mtime_ns == changed
    shutil.move(kept, tmp_path / ".out.partial")
    with pytest.raises(ConversionError, match="exists and is not empty"):
        convert(source, out, conversion, progress=False)
