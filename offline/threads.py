"""How many threads the arithmetic on a CPU takes, and how they wait for each other.

PyTorch's OpenMP lets threads spin while they wait, and its pool has as many as there are cores. A conversion of small
matrices waits thousands of times a second: two at once on one machine, or one in a container that may use less than the
cores it sees, then spend nearly all of their time spinning for threads that do not run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WAITING = "OMP_WAIT_POLICY"
CHOSEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""A user who sets one of these has chosen the number of threads."""
CHOSEN_WAITING = (WAITING, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SMALL = 2**18
"""Weights of a matrix that one core's cache holds: for fewer, a thread more costs as much as it brings."""
_CGROUPS, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def load_torch_waiting_quietly() -> None:
    """Import torch so that its threads sleep while they wait, which OpenMP takes from the environment as it is loaded.

    The environment is left as it was: what this process starts may want its threads otherwise. Where torch is loaded
    already, or the user has chosen, nothing is done.
    """
    if "torch" in sys.modules or any(name in os.environ for name in CHOSEN_WAITING):
        return
    os.environ[WAITING] = "passive"
    try:
        import torch  # noqa: F401
    finally:
        del os.environ[WAITING]


def sensible_threads(largest: int) -> int:
    """Return how many threads a conversion on a CPU takes.

    It depends on the machine and the model alone, not on what else runs: sums may differ in their last bit by the
    number of threads, and the same conversion must give the same files.

    Args:
        largest: weights of the model's largest matrix.
    """
    useful = max(1, largest // SMALL)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return min(useful, cores if quota is None else max(1, min(cores, round(quota))))


@contextmanager
def threads_for(largest: int) -> Iterator[None]:
    """Let torch take :func:`sensible_threads` for what runs inside, unless the user has set a number of threads."""
    import torch

    before = torch.get_num_threads()
    if not any(name in os.environ for name in CHOSEN):
        torch.set_num_threads(min(before, sensible_threads(largest)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _quota() -> float | None:
    """Return the CPUs that the control groups of this process allow together, the fewest of all above; None for any."""
    try:
        own = _OWN_CGROUP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found: list[float] = []
    for line in own:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = _CGROUPS / "cpu" if controllers else _CGROUPS
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder == root or root in folder.parents:
                found += _quota_of(folder)
    return min(found, default=None)


def _quota_of(folder: Path) -> list[float]:
    """Return the CPUs that one control group allows, of version 2 or 1; none where it sets no limit."""
    try:
        if (folder / "cpu.max").exists():
            most, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            most, period = ((folder / name).read_text(encoding="utf-8").strip() for name in names)
    except (OSError, ValueError):
        return []
    return [] if most in ("max", "-1") else [int(most) / int(period)]
