"""One conversion to an output at a time: a lock that dies with its process.

The lock is flock(2) on ``.NAME.milo-lock`` beside the output, so the system frees it whichever way the process ends; a
file that a killed process leaves locks nothing. Whoever holds the lock deletes the file before letting go. A second
process may have opened the file before that and lock it after: it then holds a file without a name, sees that the name
is not its own, and tries again.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from types import TracebackType

from ..errors import ConversionError

_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class OutputLock:
    """A context manager that holds the lock of an output folder, and makes its parent folders.

    Parent folders that it made go with it if nothing was put into them.

    Args:
        out: the output folder, existing or not, with its links resolved.

    Attributes:
        notes: what the user should know: that this file system has no locks.

    Raises:
        ConversionError: another process holds the lock, or the parent folder cannot be written.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._path = out.parent / f".{out.name}.milo-lock"
        self._made: list[Path] = []
        self._descriptor = -1
        self.notes: list[str] = []

    def __enter__(self) -> OutputLock:
        try:
            self._make_parents()
            while not self._try():
                pass
        except OSError as error:
            self._unmake_parents()
            raise ConversionError(f"{self._out}: cannot be written: {error}") from error
        except ConversionError:
            self._unmake_parents()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._holds_name():
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._unmake_parents()

    def _try(self) -> bool:
        """Take the lock; return whether its file still has its name.

        Raises:
            ConversionError: another process holds it.
            OSError: the file cannot be made.
        """
        # no link is followed: the file is written to
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                self.notes.append(
                    f"{self._out.parent}: this file system has no locks ({error.strerror}); see to it that no other "
                    f"process writes to {self._out}"
                )
                return True
            holder = os.pread(self._descriptor, 20, 0).decode(errors="replace").strip()
            os.close(self._descriptor)
            if not isinstance(error, BlockingIOError):
                raise
            who = f"process {holder}" if holder.isdigit() else "another process"
            raise ConversionError(
                f"{self._out}: {who} is converting to it; wait for it or end it, or choose another output"
            ) from None
        if not self._holds_name():
            os.close(self._descriptor)
            return False
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)
        return True

    def _holds_name(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._path, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def _make_parents(self) -> None:
        missing = []
        folder = self._out.parent
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._made.insert(0, folder)

    def _unmake_parents(self) -> None:
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:  # it holds the checkpoint, or what somebody else put there
                return
