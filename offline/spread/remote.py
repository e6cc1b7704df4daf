"""This end of a process that solves jobs on another device."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections import deque
from typing import IO, BinaryIO, cast

import torch

from ..errors import PassingError
from . import pipe
from .job import Done, Job


class Remote:
    """A process of its own for one device, which starts with the first job if not before.

    Args:
        device: where it solves.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._process: subprocess.Popen[bytes] | None = None
        self._sent: deque[str] = deque()
        self._closed = False

    def start(self) -> None:
        """Start the process, which takes seconds until it solves."""
        self._started()

    def send(self, job: Job) -> None:
        """Hand over a job; one more than is being solved may wait there.

        Raises:
            PassingError: the process has ended.
        """
        self._sent.append(job.matrices[0].name)
        try:
            pipe.send(cast(BinaryIO, self._started().stdin), job)
        except (EOFError, OSError) as error:
            raise self._ended() from error

    def receive(self) -> Done:
        """Return the result of the oldest job that has none yet, on the CPU.

        Raises:
            ConversionError: a matrix cannot be quantized.
            PassingError: the process has ended.
        """
        try:
            result = pipe.receive(cast(BinaryIO, self._started().stdout))
        except (EOFError, OSError) as error:
            raise self._ended() from error
        self._sent.popleft()
        if isinstance(result, BaseException):
            result.add_note(f"on {self.device}")
            raise result
        return cast(Done, result)

    def end(self) -> None:
        """End the process at once; it holds nothing that anybody wants. Whoever waits for it gets an error."""
        self._closed = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """End the process and close what led to it; nobody may be waiting for it."""
        self.end()
        if self._process is not None:
            for file in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(BrokenPipeError):  # what was on its way to the process is lost with it
                    cast(IO[bytes], file).close()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            if self._closed:
                raise EOFError
            module = f"{__package__}.process"
            command = [sys.executable, "-P", "-m", module, str(self.device), str(torch.get_num_threads())]
            paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
            # a group of its own: Ctrl-C is for this process, which then ends the other
            self._process = subprocess.Popen(
                command,
                env=os.environ | {"PYTHONPATH": paths},
                process_group=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        return self._process

    def _ended(self) -> PassingError:
        status = None if self._process is None else self._process.wait()
        about = f"{self._sent[0]} and those with it" if self._sent else "no matrix"
        return PassingError(
            f"{self.device}: the process that solves there ended with status {status} while it had {about}; what it "
            f"said is above. Was it killed, or the host out of memory?"
        )
