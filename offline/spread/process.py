"""A process that solves jobs on one device: they come through standard input, and results leave by standard output.

    python -m vllm_milo.offline.spread.process DEVICE THREADS

It ends with its input, so also with the process that started it, however that ended.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import closing
from typing import Any, BinaryIO

import torch

from ..errors import ConversionError
from . import pipe
from .ahead import ahead
from .job import Job, solve_to_send


def main(device: torch.device, threads: int) -> None:
    """Solve jobs until there are no more; the next is received, and its weights read, while one is solved."""
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between results
    torch.set_num_threads(threads)  # as in the other processes, so that sums have the same order
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.empty((), device=device)  # the GPU is made ready before the first job comes
    with closing(ahead(_jobs(sys.stdin.buffer, device.type == "cuda"))) as jobs:
        for job in jobs:
            try:
                pipe.send(results, _result(job, device) if isinstance(job, Job) else job)
            except BrokenPipeError:  # nobody wants it any more
                return


def _jobs(file: BinaryIO, pinned: bool) -> Iterator[Job | BaseException]:
    """Yield jobs whose weights were read, or the error that reading them raised."""
    while True:
        try:
            job = pipe.receive(file)
        except EOFError:
            return
        try:
            read: Job | BaseException = job.read(pinned)
        except (ConversionError, MemoryError) as error:
            read = error
        del job
        yield read
        del read


def _result(job: Job, device: torch.device) -> Any:
    """Return what comes of a job, or the error that did."""
    try:
        return solve_to_send(job, device)
    except (ConversionError, torch.OutOfMemoryError, MemoryError) as error:
        return error
    except Exception as error:
        return RuntimeError(f"{device}: {type(error).__name__}: {error}\n{traceback.format_exc()}")


if __name__ == "__main__":
    main(torch.device(sys.argv[1]), int(sys.argv[2]))
