"""This end of processes that compile for threads of this one, which hold Python's lock only to load what they made."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import subprocess
import sys
import threading
from typing import IO, cast

import triton

from ..launch import Launch
from .jobs import TargetDriver, job_of
from .known import is_known

logger = logging.getLogger("vllm.milo")

PATIENCE = 600.0
"""Seconds for a kernel, and for the start before the first one; a process that takes longer is given up."""


class Helper:
    """A process that compiles for a compute capability, one job at a time; it takes seconds to start.

    Args:
        capability: 90 for sm_90.

    Raises:
        OSError: there is no further process.
    """

    def __init__(self, capability: int) -> None:
        command = [sys.executable, "-P", "-m", f"{__package__}.process", str(capability)]
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        # a group of its own: Ctrl-C is for this process, which then ends the other
        self._process = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
            process_group=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if logger.isEnabledFor(logging.DEBUG) else subprocess.DEVNULL,
        )
        self._jobs, self._replies = (cast(IO[bytes], file) for file in (self._process.stdin, self._process.stdout))

    def compile(self, job: bytes) -> str | None:
        """Compile a pickled job into Triton's cache on disk; return what went wrong, if anything did.

        Raises:
            EOFError, OSError, pickle.UnpicklingError: the process has ended.
        """
        watch = threading.Timer(PATIENCE, self._process.kill)
        watch.start()
        try:
            pickle.dump(job, self._jobs)
            self._jobs.flush()
            return cast(str | None, pickle.load(self._replies))
        finally:
            watch.cancel()

    def end(self) -> int:
        """End the process at once, which nobody may be waiting for; return its status."""
        self._process.kill()
        for file in (self._jobs, self._replies):
            with contextlib.suppress(BrokenPipeError):  # what was on its way to the process is lost with it
                file.close()
        return self._process.wait()


class Helpers:
    """Processes that compile for threads, at most as many as threads ask at once.

    They start when something is new to this machine, and end when nothing more is expected. Where one ended by itself
    no more are started: what ended it, or let it not even start, would most likely end the next one too.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[Helper] = []
        self._expected = 0
        self._one_was_lost = False

    def expect(self) -> None:
        """Announce a call of :meth:`compile`."""
        with self._lock:
            self._expected += 1

    def compile(self, launch: Launch) -> None:
        """Have a launch compiled for the current device, into Triton's cache on disk, if it is not there and can be.

        Whatever prevents it is told at debug level, and left to who compiles the launch in this process.
        """
        try:
            said = None if is_known(launch) else self._compile(launch)
        except Exception as error:  # of any kind: this process can compile without help
            said = f"{type(error).__name__}: {error}"
        if said is not None:
            logger.debug("MiLo compiles %s in its own process: %s", launch.kernel, said)
        with self._lock:
            self._expected -= 1
            done = [] if self._expected else self._idle
            if done:
                self._idle = []
        for helper in done:
            helper.end()

    def _compile(self, launch: Launch) -> str | None:
        """Do so; return what prevented it."""
        job = pickle.dumps(job_of(launch))
        target = triton.runtime.driver.active.get_current_target()
        if TargetDriver(target.arch).target != target:
            return f"helpers do not compile for {target}"
        try:
            helper = self._take(target.arch)
        except OSError:
            self._one_was_lost = True
            raise
        if helper is None:
            return "a helper was lost"
        try:
            said = helper.compile(job)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            self._one_was_lost = True
            return f"a helper ended with status {helper.end()} ({type(error).__name__})"
        with self._lock:
            self._idle.append(helper)
        return said

    def _take(self, capability: int) -> Helper | None:
        """Return a process that has nothing to do; None where none is to be started."""
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return None if self._one_was_lost else Helper(capability)
