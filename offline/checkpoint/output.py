"""Which folders a conversion may write to: never one whose loss would be more than an old checkpoint's."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from vllm_milo.checkpoint import CheckpointError
from vllm_milo.shards import ShardError, read_json
from vllm_milo.values import shown

from ..durable.files import UNFINISHED
from ..durable.journal import JOURNAL_NAME
from ..errors import ConversionError
from .manifest import CARD_NAME, MANIFEST_NAME, read_manifest

_LONGEST_NAME = 255 - len(".") - len(".partial-1234567890.replaced")
"""Bytes of a folder's name that leave room for what the hidden folders beside it are called."""
_ALWAYS_OWN = re.compile(
    r"(config|milo_report|generation_config|tokenizer|tokenizer_config|special_tokens_map)\.json|README_SOURCE\.md|"
    r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
)
"""Names of the files that are in any checkpoint or in most."""
_DOWNLOADED = (".cache/huggingface/", ".gitattributes")
"""What a download from the Hub leaves in a checkpoint."""


def refuse_unsafe_output(out: Path, source: Path, overwrite: bool) -> None:
    """Refuse an output folder that is not safe to write or to replace. All paths count with their links resolved.

    Args:
        out: the output folder, existing or not.
        source: the model folder that is read.
        overwrite: whether an existing checkpoint may be replaced.

    Raises:
        ConversionError: ``out`` is the source, holds it or lies in it; is the working or the home directory or holds
            one of them; is a file; or has content that may not be replaced: without ``overwrite`` any, with it
            whatever is no MiLo checkpoint, or no file of it.
    """
    refuse_unsafe_place(out, source)
    refuse_unsafe_content(out, overwrite)


def refuse_unsafe_content(out: Path, overwrite: bool) -> None:
    """Refuse an output folder by what it holds; see :func:`refuse_unsafe_output`."""
    try:
        if out.exists() and not out.is_dir():
            raise ConversionError(f"{out}: is a file, not a folder; choose another output")
        if not out.exists() or not any(out.iterdir()):
            return
        if not overwrite:
            replaceable = is_milo_checkpoint(out) and not _strange_files(out)
            or_replace = " or pass --overwrite" if replaceable else " output"
            raise ConversionError(f"{out}: exists and is not empty; choose another{or_replace}")
        if not is_milo_checkpoint(out):
            raise ConversionError(
                f"{out}: holds files, but is no MiLo checkpoint; --overwrite replaces only those. Choose another output"
            )
        if strange := _strange_files(out):
            more = f" (and {len(strange) - 1} more)" if len(strange) > 1 else ""
            raise ConversionError(
                f"{out}: holds {strange[0]}{more}, which is not of the MiLo checkpoint there; --overwrite would delete "
                f"it. Move it away, or choose another output"
            )
    except OSError as error:
        raise ConversionError(f"{out}: cannot be written: {error}") from error


def _strange_files(checkpoint: Path) -> list[str]:
    """Return the files in a checkpoint that somebody put there, or may have where no manifest tells."""
    try:
        own = set(read_manifest(checkpoint) or ())
    except (CheckpointError, ShardError):
        own = set()
    if not own:
        own = {path.name for path in checkpoint.iterdir() if _ALWAYS_OWN.fullmatch(path.name)}
    paths = (path for path in checkpoint.rglob("*") if path.is_symlink() or not path.is_dir())
    held = (path.relative_to(checkpoint).as_posix() for path in paths)
    known = {*own, MANIFEST_NAME, CARD_NAME}
    return sorted(name for name in held if name not in known and not name.startswith(_DOWNLOADED))


def refuse_others_folder(partial: Path) -> None:
    """Refuse to work in a hidden folder that no conversion has made: what is in it would be deleted.

    Args:
        partial: where a conversion works.

    Raises:
        ConversionError: something else stands there; it is named.
    """
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        strange = [partial]
    elif (partial / JOURNAL_NAME).exists():
        return
    else:  # a kill may have come before the journal
        strange = [path for path in partial.rglob("*") if not path.is_dir() and path.suffix != UNFINISHED]
    if strange:
        raise ConversionError(f"{strange[0]}: is in the way of the conversion, which works in {partial}; move it away")


def refuse_unwritable_output(out: Path) -> None:
    """Refuse an output folder that could not be made or renamed when everything is computed.

    A checkpoint is written beside its place and renamed into it. Nothing can be renamed over a mount point.

    Raises:
        ConversionError: says what is in the way.
    """
    target = resolved(out)
    try:
        os.fsencode(target).decode("utf-8")
    except UnicodeDecodeError:
        raise ConversionError(f"{shown(str(out))}: cannot be written: its path is not UTF-8; choose another") from None
    if is_mount_point(target):
        raise ConversionError(
            f"{out}: is a mount point (a volume?), which a finished checkpoint cannot be renamed over; name a folder "
            f"in it, such as {out / 'model'}"
        )
    try:
        parent = next(folder for folder in target.parents if folder.exists())
    except OSError as error:
        raise ConversionError(f"{out}: cannot be written: {error.strerror}") from error
    if not parent.is_dir():
        raise ConversionError(f"{out}: cannot be written: {parent} is a file; choose another output")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConversionError(f"{out}: cannot be written: {parent} may not be written to; choose another output")
    if target.is_dir() and not os.access(target, os.W_OK | os.X_OK):  # a folder is renamed by whom may write to it
        raise ConversionError(f"{out}: cannot be replaced: it may not be written to; choose another output")
    if len(os.fsencode(target.name)) > _LONGEST_NAME:
        raise ConversionError(f"{out}: cannot be written: its name is too long; choose a shorter one")


def resolved(folder: Path, used: str = "written") -> Path:
    """Return the path of a folder with its links resolved, whether it exists or not.

    Args:
        folder: of a model or checkpoint.
        used: what cannot be done with it where that fails.

    Raises:
        ConversionError: a link in it leads back to itself, or a name in it is too long.
    """
    try:
        target = folder.resolve()
        endless = any(path.is_symlink() for path in (target, *target.parents))
    except RuntimeError:  # until Python 3.12
        endless = True
    except OSError as error:
        raise ConversionError(f"{folder}: cannot be {used}: {error.strerror}") from error
    if endless:
        raise ConversionError(f"{folder}: is or goes through a link to itself; name another folder")
    return target


def is_mount_point(folder: Path) -> bool:
    """Return whether something is mounted at a resolved path, on Linux also from the same file system."""
    if os.path.ismount(folder):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    places = (re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), line.split()[4]) for line in lines)
    return str(folder) in places


def is_milo_checkpoint(folder: Path) -> bool:
    """Return whether a folder's config.json says that it is a MiLo checkpoint, whole or not."""
    try:
        return bool(read_json(folder / "config.json")["quantization_config"]["quant_method"] == "milo")
    except (ShardError, LookupError, TypeError):
        return False


def refuse_unsafe_place(out: Path, source: Path) -> None:
    """Refuse an output folder by where it is; see :func:`refuse_unsafe_output`."""
    target, origin = resolved(out), resolved(source, "read")
    if _is_same(target, origin):
        raise ConversionError(f"{out}: is the source model; choose another output")
    if _holds(target, origin):
        raise ConversionError(f"{out}: holds the source model {source}; choose another output")
    if _holds(origin, target):
        raise ConversionError(f"{out}: lies in the source model {source}; choose another output")
    for place, what in ((Path.cwd(), "the working directory"), (_home(), "the home directory")):
        if place is not None and (_is_same(target, place.resolve()) or _holds(target, place.resolve())):
            raise ConversionError(
                f"{out}: is {what} or holds it; name a folder of the checkpoint's own (is a shell variable unset?)"
            )
    for file in _files_elsewhere(origin):
        if target in file.parents:
            raise ConversionError(f"{out}: holds {file.name} of the source model {source}; choose another output")


def _is_same(one: Path, other: Path) -> bool:
    """Return whether two resolved paths are one folder, which a mount or the case of letters may hide."""
    try:
        return one == other or one.samefile(other)
    except OSError:  # one of them is not there
        return False


def _holds(folder: Path, inner: Path) -> bool:
    """Return whether a resolved path lies in a folder."""
    return any(_is_same(folder, parent) for parent in inner.parents)


def _files_elsewhere(source: Path) -> Iterator[Path]:
    """Yield where the links at the top of a model folder lead."""
    try:
        yield from (path.resolve() for path in source.iterdir() if path.is_symlink())
    except (OSError, RuntimeError):  # no folder, or a link to itself: what reads the source says so
        return


def _home() -> Path | None:
    try:
        return Path.home()
    except RuntimeError:  # no home directory can be determined
        return None
