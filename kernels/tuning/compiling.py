"""Compiles what candidates launch in several processes: that takes far longer than to time them.

A process here has no GPU. It compiles for the parent's target into Triton's cache on disk, where the parent finds it.
Threads would not do: they wait for each other, since each holds Python's lock for almost half of a compilation.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import torch

from ..compiling.jobs import Job, job_of, use_target
from ..compiling.threads import usable_cores
from ..launch import noting
from ..tuned import Tiles
from .layer import Layer
from .timing import Budget


def processes() -> int:
    """Return how many processes compile: one for each core but one, and at most 24."""
    return max(1, min(24, usable_cores() - 1))


def compile_candidates(layer: Layer, wanted: Iterable[tuple[int, Tiles]], workers: int, budget: Budget) -> int:
    """Compile the kernels of pairs of tiles, each with a number of tokens; return how many were compiled in time.

    What fails here fails again, and says why, when it is timed.

    Args:
        layer: that the tiles are for, on a GPU.
        wanted: numbers of tokens and tiles, the likely ones first.
        workers: processes that compile.
        budget: what is not compiled when it is spent is compiled when it is timed.
    """
    inputs = {}
    with noting() as launches:
        for tokens, tiles in wanted:
            if tokens not in inputs:
                inputs[tokens] = layer.inputs(tokens)
            layer.calls(inputs[tokens], tiles)[0]()
    major, minor = torch.cuda.get_device_capability(layer.device)
    return compile_jobs([job_of(launch) for launch in launches.values()], 10 * major + minor, workers, budget)


def compile_jobs(jobs: Sequence[Job], capability: int, workers: int, budget: Budget) -> int:
    """Compile kernels for a compute capability (90 for sm_90) in processes; return how many were compiled in time."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=use_target, initargs=(capability,))
    try:
        made: list[Future[None]] = [pool.submit(Job.compile, job) for job in jobs]
        done, _ = wait(made, max(0.0, budget.left()))
        return sum(one.exception() is None for one in done)
    except BrokenProcessPool:  # a process found no memory, say: what is missing is compiled when it is timed
        return 0
    finally:
        for process in list((pool._processes or {}).values()):  # within a kernel, whose result nobody awaits
            process.kill()
        pool.shutdown(wait=True, cancel_futures=True)
