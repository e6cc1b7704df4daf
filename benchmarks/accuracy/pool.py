"""Runs `milo quantize` for many contenders in worker processes, through the public command line."""

from __future__ import annotations

import contextlib
import io
import math
import multiprocessing
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch

from benchmarks.accuracy.contenders import Contender
from vllm_milo.offline.cli import main as milo

INTERRUPTED = (130, 143)
"""Exit statuses of `milo` after Ctrl-C and SIGTERM."""


class Job(NamedTuple):
    """One call of the command line: the source model, the checkpoint to write, and the arguments after them."""

    model: Path
    out: Path
    arguments: tuple[str, ...]


class Outcome(NamedTuple):
    """What a call did: its folder, seconds, and the message where it failed."""

    out: Path
    seconds: float
    error: str | None


def run_job(job: Job) -> Outcome:
    """Quantize once, in this process."""
    start = time.monotonic()
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code = milo(["quantize", str(job.model), "-o", str(job.out), "--quiet", *job.arguments])
        except SystemExit as error:  # what argparse does about options it does not know
            code = error.code if isinstance(error.code, int) else 1
        except Exception as error:  # one broken contender must not end the benchmark; its row says what happened
            print(f"{type(error).__name__}: {error}")
            code = 1
    # `milo` turns SIGTERM, by which the pool ends its workers, into an orderly return: that must end this process too
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if code in INTERRUPTED:
        # nobody goes on with its layers
        shutil.rmtree(job.out.with_name(f".{job.out.name}.partial"), ignore_errors=True)
        sys.exit(code)
    lines = output.getvalue().strip().splitlines()
    message = (lines[-1] if lines else f"exit status {code}") if code else None
    return Outcome(job.out, time.monotonic() - start, message)


class QuantizePool:
    """A context manager: starts on all jobs at once; iterating yields contenders and outcomes in order.

    Args:
        jobs: what to run.
        processes: workers; with more than one each uses one thread.
        deadline: ``time.monotonic()`` at which what is not done is given up, with an outcome that says so.
    """

    def __init__(self, jobs: Sequence[tuple[Contender, Job]], processes: int, deadline: float) -> None:
        self.jobs = jobs
        self.deadline = deadline
        context = multiprocessing.get_context("spawn")
        self._pool = context.Pool(processes, initializer=_limit_threads, initargs=(processes,))
        self._results = self._pool.imap(run_job, [job for _, job in jobs])

    def __enter__(self) -> QuantizePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.terminate()
        self._pool.join()

    def __iter__(self) -> Iterator[tuple[Contender, Outcome]]:
        late = False
        for contender, job in self.jobs:
            left = self.deadline - time.monotonic()
            # scoring may be slower than the workers: their results do not count after the deadline either
            late = late or left <= 0
            outcome = Outcome(job.out, 0.0, "skipped: out of time")
            if not late:
                try:
                    outcome = self._results.next(None if math.isinf(left) else left)
                except multiprocessing.TimeoutError:
                    late = True  # a result that comes later would be taken for the next contender's
            yield contender, outcome


def _limit_threads(processes: int) -> None:
    if processes > 1:
        torch.set_num_threads(1)
