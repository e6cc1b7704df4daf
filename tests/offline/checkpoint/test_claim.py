"""What killed conversions left at an output, of this version and the one before."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from refusals import FAST

from vllm_milo.offline.checkpoint.claim import Claim
from vllm_milo.offline.cli import main as milo
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.durable.journal import Journal
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.planning.plan import make_plan
from vllm_milo.offline.source.reader import ModelReader


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
    same = {"seconds": 0, "warnings": [], "peak_host_bytes": 0, "spent": {}}
    assert again._replace(**same) == first._replace(**same)
    assert again.warnings == [f"{out}: was complete when its conversion was killed"]
    assert out.stat().st_mtime_ns == changed
    shutil.move(kept, tmp_path / ".out.partial")
    with pytest.raises(ConversionError, match="exists and is not empty"):
        convert(source, out, conversion, progress=False)


def test_a_dry_run_sees_what_a_conversion_would_and_changes_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    out, conversion = tmp_path / "out", Conversion(FAST)
    monkeypatch.setattr("vllm_milo.offline.convert.validate_checkpoint", raise_interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, conversion, progress=False)
    before = sorted(tmp_path.rglob("*"))
    command = ["quantize", str(source), "-o", str(out), "--calibration", "none", "--dry-run", "--device", "cpu"]
    assert milo(command) == 1
    assert "2 of 2 layers of a conversion that did not end are in" in capsys.readouterr().err
    for option, note in (("--resume", "going on after 2 of 2 layers"), ("--overwrite", "will be deleted")):
        assert milo([*command, option]) == 0
        assert note in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def raise_interrupt(_: Path) -> None:
    raise KeyboardInterrupt


def test_what_is_unfinished_counts_as_room(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    monkeypatch.setattr("vllm_milo.offline.convert.validate_checkpoint", raise_interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, Conversion(FAST), progress=False)
    reader, resumed = ModelReader(source), Conversion(FAST, resume=True)
    need, held = make_plan(reader, out, resumed).peak_disk_bytes, Claim(out, source).held_bytes
    assert held > 100_000
    monkeypatch.setattr("vllm_milo.offline.planning.disk.free_bytes", lambda _: need - held)
    for conversion in (resumed, Conversion(FAST, overwrite=True)):
        make_plan(reader, out, conversion)
    monkeypatch.setattr("vllm_milo.offline.planning.disk.free_bytes", lambda _: need - held - 1)
    with pytest.raises(ConversionError, match=r"are free on its file system beside .* of unfinished layers; free"):
        make_plan(reader, out, resumed)


@pytest.mark.parametrize(
    "sealed", ["[]", "null", '{"target": 5, "manifest": ""}', '{"target": "../x", "manifest": ""}']
)
def test_a_damaged_seal_says_nothing(source: Path, tmp_path: Path, sealed: str):
    partial = tmp_path / ".out.partial"
    Journal(partial).begin({}, 1)
    (partial / "sealed.json").write_text(sealed)
    with Claim(tmp_path / "out", source) as claim:
        assert claim.published is None
