"""Output folders: a checkpoint appears whole or not at all, and nothing that was there is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from folder_edits import edit_tensors
from refusals import FAST, Q_PROJ, WEIGHTS

from vllm_milo.offline.checkpoint import writer
from vllm_milo.offline.cli import main as milo
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.errors import ConversionError
from vllm_milo.validation import read_format, validate_checkpoint


def test_existing_output_is_kept(source: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("data")
    with pytest.raises(ConversionError, match="exists and is not empty; choose another output"):
        convert(source, out, Conversion(FAST), progress=False)
    assert (out / "precious.txt").read_text() == "data"


def test_overwrite_is_the_advice_where_it_would_be_taken(source: Path, checkpoint: Path, tmp_path: Path):
    out = Path(shutil.copytree(checkpoint, tmp_path / "out"))
    with pytest.raises(ConversionError, match="exists and is not empty; choose another or pass --overwrite"):
        convert(source, out, Conversion(FAST), progress=False)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConversionError, match="exists and is not empty; choose another output"):
        convert(source, out, Conversion(FAST), progress=False)


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


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused_untouched(source: Path, out: Path, message: str, watched: Path) -> None:
    """Assert that a conversion with --overwrite is refused before any work, and that ``watched`` stays as it was."""
    before = snapshot(watched)
    with pytest.raises(ConversionError, match=message):
        convert(source, out, Conversion(FAST, overwrite=True), progress=False)
    assert snapshot(watched) == before


@pytest.mark.parametrize("through_link", [False, True])
def test_the_source_is_no_output(source: Path, tmp_path: Path, through_link: bool):
    out = source
    if through_link:
        out = tmp_path / "link"
        out.symlink_to(source)
    refused_untouched(source, out, "is the source model", tmp_path)


@pytest.mark.parametrize("through_link", [False, True])
def test_a_folder_around_the_source_is_no_output(source: Path, tmp_path: Path, through_link: bool):
    parent = tmp_path / "parent"
    (parent / "neighbour").mkdir(parents=True)
    (parent / "neighbour" / "precious.txt").write_text("data")
    inside = Path(shutil.move(source, parent / "model"))
    out = parent
    if through_link:
        out = tmp_path / "link"
        out.symlink_to(parent)
    refused_untouched(inside, out, "holds the source model", tmp_path)


def test_a_folder_in_the_source_is_no_output(source: Path, tmp_path: Path):
    refused_untouched(source, source / "milo", "lies in the source model", tmp_path)


def test_a_mount_hides_no_source(source: Path, tmp_path: Path):
    """A folder in the source, the source and a folder around it, each by another path, as in a container."""
    parent, place = tmp_path / "parent", tmp_path / "mount"
    parent.mkdir()
    place.mkdir()
    inside = Path(shutil.move(source, parent / "model"))
    try:
        mounted = subprocess.run(["mount", "--bind", str(parent), str(place)], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if mounted.returncode:
        pytest.skip("mounting is not permitted")
    try:
        refused_untouched(inside, place / "model" / "milo", "lies in the source model", parent)
        refused_untouched(inside, place / "model", "is the source model", parent)
        refused_untouched(inside, place, "holds the source model", parent)
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_files_of_the_source_that_lie_in_the_output_are_kept(source: Path, checkpoint: Path, tmp_path: Path):
    """Links of the source lead there, to a name that the checkpoint's manifest has."""
    out = Path(shutil.copytree(checkpoint, tmp_path / "out"))
    (source / "generation_config.json").unlink()
    (source / "generation_config.json").symlink_to(out / "generation_config.json")
    refused_untouched(source, out, "holds generation_config.json of the source model", tmp_path)


def test_a_checkpoint_that_cannot_be_moved_is_refused_at_once(
    source: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, access = Path(shutil.copytree(checkpoint, tmp_path / "out")), os.access
    monkeypatch.setattr(os, "access", lambda path, *more, **options: path != out and access(path, *more, **options))
    refused_untouched(source, out, "out: cannot be replaced: it may not be written to", tmp_path)


@pytest.mark.parametrize("out", [".", "..", ""])
def test_the_working_directory_is_no_output(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str):
    here = tmp_path / "work" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    refused_untouched(source, Path(out), "is the working directory or holds it", tmp_path)


def test_the_home_directory_is_no_output(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    home = tmp_path / "home" / "me"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for out in (home, home.parent):
        refused_untouched(source, out, "is the home directory or holds it", tmp_path)


def test_an_empty_output_is_refused_by_the_command(source: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        milo(["quantize", str(source), "-o", "", "--overwrite"])
    assert "is empty; is a shell variable unset?" in capsys.readouterr().err


@pytest.mark.parametrize("config", [None, "{}", "[]", "null", '{"quantization_config": {"quant_method": "gptq"}}', "?"])
def test_only_checkpoints_are_overwritten(source: Path, tmp_path: Path, config: str | None):
    out = tmp_path / "documents"
    out.mkdir()
    (out / "precious.txt").write_text("data")
    if config is not None:
        (out / "config.json").write_text(config)
    refused_untouched(source, out, "is no MiLo checkpoint; --overwrite replaces only those", tmp_path)


def test_files_of_the_users_in_a_checkpoint_are_kept(source: Path, tmp_path: Path):
    """What a download leaves there, and an edited model card, are not in the way."""
    out = tmp_path / "out"
    convert(source, out, Conversion(FAST), progress=False)
    for name in (".cache/huggingface/x.lock", ".gitattributes", "README.md"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    convert(source, out, Conversion(FAST, overwrite=True), progress=False)
    for name in ("notes.txt", "runs/loss.csv", ".git/HEAD"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
        refused_untouched(source, out, rf"out: holds {name}, which is not of the MiLo checkpoint there", tmp_path)
        (out / name).unlink()
    (out / "link").symlink_to(tmp_path)
    (out / "notes.txt").write_text("mine")
    refused_untouched(source, out, r"out: holds link \(and 1 more\), which is not of", tmp_path)


@pytest.mark.parametrize("manifest", [None, "{", '{"format_version": 1, "files": {}}'])
def test_files_of_the_users_are_kept_where_no_manifest_tells(
    source: Path, checkpoint: Path, tmp_path: Path, manifest: str | None
):
    out = Path(shutil.copytree(checkpoint, tmp_path / "out"))
    (out / "milo_manifest.json").unlink()
    if manifest is not None:
        (out / "milo_manifest.json").write_text(manifest)
    (out / "notes.txt").write_text("mine")
    refused_untouched(source, out, r"out: holds notes\.txt, which is not of the MiLo checkpoint there", tmp_path)
    (out / "notes.txt").unlink()
    convert(source, out, Conversion(FAST, overwrite=True), progress=False)
    assert validate_checkpoint(out)


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_what_stands_where_a_conversion_works_is_kept(source: Path, tmp_path: Path, kind: str):
    partial, mine = tmp_path / ".out.partial", tmp_path / "mine"
    mine.mkdir()
    (mine / "precious.txt").write_text("data")
    if kind == "file":
        partial.write_text("data")
    elif kind == "link":
        partial.symlink_to(mine)
    else:
        mine.rename(partial)
    for resume in (False, True):
        before = snapshot(tmp_path)
        with pytest.raises(
            ConversionError, match=r"\.out\.partial\S*: is in the way of the conversion, .* move it away"
        ):
            convert(source, tmp_path / "out", Conversion(FAST, overwrite=True, resume=resume), progress=False)
        assert snapshot(tmp_path) == before
        assert partial.is_symlink() == (kind == "link")


def test_a_folder_that_a_kill_left_before_its_journal_is_not_in_the_way(source: Path, tmp_path: Path):
    (tmp_path / ".out.partial" / "layers").mkdir(parents=True)
    (tmp_path / ".out.partial" / "journal.json.tmp").write_text("{")
    convert(source, tmp_path / "out", Conversion(FAST), progress=False)
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize("inside", ["", "further"])
def test_a_link_to_itself_is_no_output(source: Path, tmp_path: Path, inside: str):
    (tmp_path / "link").symlink_to("link")
    refused_untouched(source, tmp_path / "link" / inside, r"a link to itself; name another folder", source)
    assert (tmp_path / "link").is_symlink()


def test_a_name_that_is_not_utf8(source: Path, tmp_path: Path):
    refused_untouched(
        source, tmp_path / "\udcff", r"cannot be written: its path is not UTF-8; choose another", tmp_path
    )


def test_a_way_back_through_a_folder_that_is_not_there(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "none" / ".." / "out"
    assert milo(["quantize", str(source), "-o", str(out), "--method", "rtn", "--quiet"]) == 0
    assert f"vllm serve {tmp_path / 'out'} --quantization milo" in capsys.readouterr().out
    assert validate_checkpoint(tmp_path / "out")


def test_the_root_is_no_output(source: Path):
    with pytest.raises(ConversionError, match=r"^/: is the root of the file system; name a folder"):
        convert(source, Path("/"), Conversion(FAST, overwrite=True), progress=False)


def during(monkeypatch: pytest.MonkeyPatch, act) -> None:
    """Let ``act`` happen when a conversion is about to publish."""
    seal = writer.CheckpointWriter.seal

    def sealed(self, *arguments):
        seal(self, *arguments)
        act()

    monkeypatch.setattr(writer.CheckpointWriter, "seal", sealed)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_meanwhile_is_kept(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool):
    out = tmp_path / "out"

    def appear() -> None:
        out.mkdir()
        (out / "precious.txt").write_text("data")

    during(monkeypatch, appear)
    summary = convert(source, out, Conversion(FAST, overwrite=overwrite), progress=False)
    assert snapshot(out) == {"precious.txt": b"data"}
    assert summary.out == tmp_path / "out-2"
    assert validate_checkpoint(summary.out)
    assert "appeared during the conversion and was kept" in summary.warnings[-1]


def test_a_link_that_appears_meanwhile_is_kept(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also one that leads nowhere, over which no folder can be renamed."""
    out = tmp_path / "out"
    during(monkeypatch, lambda: out.symlink_to("nowhere"))
    summary = convert(source, out, Conversion(FAST), progress=False)
    assert out.is_symlink()
    assert summary.out == tmp_path / "out-2"
    assert validate_checkpoint(summary.out)


def test_a_checkpoint_that_was_exchanged_meanwhile_is_kept(
    source: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = Path(shutil.copytree(checkpoint, tmp_path / "out"))

    def exchange() -> None:
        out.rename(tmp_path / "old")
        shutil.copytree(checkpoint, out)

    during(monkeypatch, exchange)
    before = snapshot(out)
    summary = convert(source, out, Conversion(FAST, overwrite=True), progress=False)
    assert snapshot(out) == before
    assert summary.out == tmp_path / "out-2"


def test_the_output_is_looked_at_before_a_calibration(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "vllm_milo.offline.cli.quantize.calibration_windows", lambda *_: pytest.fail("calibrated first")
    )
    assert milo(["quantize", str(source), "-o", str(source), "--overwrite", "--quiet"]) == 1


def test_output_under_a_file(source: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match="cannot be written"):
        convert(source, tmp_path / "file" / "out", Conversion(FAST), progress=False)


def test_output_where_nobody_may_write(source: Path):
    with pytest.raises(ConversionError, match=r"/proc/milo/out: cannot be written"):
        convert(source, Path("/proc/milo/out"), Conversion(FAST), progress=False)
