"""An output folder that one conversion alone writes to, and what is left there of conversions that were killed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from ..durable.files import describe_file, discard, discard_rest
from ..durable.journal import Journal
from ..durable.lock import OutputLock
from ..durable.publication import SEALED
from ..errors import ConversionError
from .manifest import MANIFEST_NAME
from .output import (
    refuse_others_folder,
    refuse_unsafe_content,
    refuse_unsafe_place,
    refuse_unwritable_output,
    resolved,
)


class Claim:
    """A context manager: from entering to leaving it, no other conversion can write to the output.

    Entering brings back a checkpoint that a killed conversion had moved away and not replaced, and names other
    leftovers in ``notes``. Finished layers of a conversion that did not end are never deleted unasked: without
    ``overwrite`` and ``resume`` they are an error.

    Args:
        out: the output folder, existing or not.
        source: the model folder that is converted.
        overwrite: replace an existing MiLo checkpoint, and finished layers unless ``resume`` is given too.
        resume: go on with the finished layers, if there are any.

    Attributes:
        out: with its links resolved.
        partial: the hidden folder beside it where a conversion works.
        replaced: where an old checkpoint is, while the new one takes its place.
        journal: of the partial folder, read.
        published: where the checkpoint of the partial folder is, if the conversion was killed after that; else None.
        notes: what the user should know before the work begins.

    Raises:
        ConversionError: ``out`` is not safe to write, another process writes to it, or unfinished layers are in the
            way.
    """

    def __init__(self, out: Path, source: Path, overwrite: bool = False, resume: bool = False) -> None:
        self._given, self.source, self.overwrite, self.resume = out, source, overwrite, resume
        self.out = resolved(out)
        if not self.out.name:
            raise ConversionError(f"{out}: is the root of the file system; name a folder of the checkpoint's own")
        self.partial = _partial(self.out)
        self.replaced = self.out.with_name(f".{self.out.name}.replaced")
        self.published: Path | None = None
        self.journal = Journal(self.partial)
        self._lock = OutputLock(self.out)
        self.notes = self._lock.notes

    def check(self) -> None:
        """Refuse what entering would refuse, but for a process that holds the lock. Nothing is changed, nothing held.

        Raises:
            ConversionError: as of entering.
        """
        refuse_unsafe_place(self._given, self.source)
        refuse_unwritable_output(self._given)
        refuse_others_folder(self.partial)
        published = _published(self.partial)
        if published and self.resume:
            self.published = published
        else:
            refuse_unsafe_content(self._given, self.overwrite)
        if self.resume or not published:  # what is left of a published checkpoint is of no use, and goes
            self._read_journal()

    @property
    def decided(self) -> Mapping[str, Any]:
        """Return what decided the result of the finished layers that the conversion goes on with; nothing without."""
        return self.journal.fingerprint or {} if self.resume and self.journal.quantized else {}

    @property
    def held_bytes(self) -> int:
        """Return the bytes of the partial folder: what the conversion goes on with, or deletes when it begins."""
        try:
            found = [path.stat() for path in self.partial.rglob("*") if path.is_file()]
        except OSError:
            return 0
        return sum({status.st_ino: status.st_size for status in found}.values())  # a file may have two names

    def __enter__(self) -> Claim:
        refuse_unsafe_place(self._given, self.source)
        refuse_unwritable_output(self._given)
        if self.out.exists() and not self.out.is_dir():
            refuse_unsafe_content(self._given, self.overwrite)  # says that it is a file
        with ExitStack() as stack:
            stack.enter_context(self._lock)
            try:
                refuse_others_folder(self.partial)
                self._settle()
            except OSError as error:
                raise ConversionError(f"{self.out}: cannot be written: {error}") from error
            if not (self.published and self.resume):
                refuse_unsafe_content(self._given, self.overwrite)
            if self.published and not self.resume:
                discard(self.partial)
                self.published = None
            self._read_journal()
            self._held = stack.pop_all()  # a failure before this has let the lock go
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def _settle(self) -> None:
        """Bring back what a killed conversion moved away, and delete what it had no more use for."""
        self.published = _published(self.partial)
        for folder in (self.partial, self.replaced):
            discard_rest(folder)
        old = [self.replaced, *(path for path, pid in self._older_debris() if path.suffix == ".replaced" and not pid)]
        for folder in old:
            if not folder.exists():
                continue
            if not self.out.exists():
                os.rename(folder, self.out)
                self.notes.append(f"{self.out}: a killed conversion had moved it away; it is back")
            elif self.published == self.out:
                discard(folder)
            else:
                self.notes.append(f"{folder}: a checkpoint that a killed conversion moved away from {self.out}")
        for path, pid in self._older_debris():
            if not pid and path.suffix == ".replaced":
                continue  # named above
            if pid:
                self.notes.append(f"{path}: process {pid} may still write to it")
            elif self.overwrite:
                discard(path)
                self.notes.append(f"{path}: left by a killed conversion of an older version; deleted")
            else:
                self.notes.append(f"{path}: left by a killed conversion of an older version; delete it")

    def _read_journal(self) -> None:
        """Read what is finished, and say what comes of it, or that it is in the way."""
        try:
            self.journal.read()
        except ConversionError as error:
            if not self.overwrite or self.resume:
                raise
            self.notes.append(f"{error}: they are deleted")
            self.journal = Journal(self.partial)
            return
        journal = self.journal
        if self.published:
            self.notes.append(f"{self.published}: was complete when its conversion was killed")
        elif not journal.quantized:
            if self.resume:
                self.notes.append(f"{self.out}: there is nothing to go on with; the conversion begins")
        elif self.resume:
            self.notes.append(f"{self.out}: going on after {journal.progress}")
        elif self.overwrite:
            self.notes.append(f"{self.out}: {journal.progress} of a conversion that did not end will be deleted")
        else:
            raise ConversionError(
                f"{self.out}: {journal.progress} of a conversion that did not end are in {self.partial}; go on with "
                f"--resume, or start over with --overwrite"
            )

    def _older_debris(self) -> list[tuple[Path, int]]:
        """Return what version 0.1 left, with the process if it is alive, else 0."""
        name = re.compile(re.escape(f".{self.out.name}.partial-") + r"(\d+)(\.replaced)?")
        found = []
        for path in sorted(self.out.parent.iterdir()):
            match = name.fullmatch(path.name)
            if match:
                pid = int(match[1])
                found.append((path, pid if _alive(pid) else 0))
        return found


def refuse_unfinished(out: Path) -> None:
    """Raise ConversionError where an output folder is not there because its conversion has not ended."""
    if not out.is_dir() and out.name and _partial(resolved(out)).is_dir():
        raise ConversionError(
            f"{out}: its conversion has not ended, or was killed; its command with --resume goes on, and is refused "
            f"while it still runs"
        )


def _partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def _published(partial: Path) -> Path | None:
    """Return where the sealed checkpoint of a partial folder is, if it was published; else None."""
    try:
        sealed = json.loads((partial / SEALED).read_text(encoding="utf-8"))
        target = partial.with_name(sealed["target"])
        there = describe_file(target / MANIFEST_NAME).sha256
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged, it says nothing
        return None
    return target if there == sealed["manifest"] else None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
