"""Launches that are compiled in a process without a GPU, into Triton's cache on disk, where others find them."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from ..launch import Launch, work_out_key


class Job(NamedTuple):
    """A launch as it goes to another process: the kernel by its module and name."""

    module: str
    name: str
    arguments: list[Any]
    constants: dict[str, Any]

    def compile(self) -> None:
        """Compile the kernel for the target of :func:`use_target`; nothing is loaded."""
        kernel = getattr(importlib.import_module(self.module), self.name)
        work_out_key(kernel)
        kernel.warmup(*self.arguments, grid=(1,), **self.constants)


class TargetDriver:
    """What Triton asks of a driver before it compiles, for a GPU that this process does not use."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """Return the number of the device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the number of the stream."""
        return 0


def job_of(launch: Launch) -> Job:
    """Return a noted launch as it goes to another process."""
    function = launch.kernel.fn
    return Job(function.__module__, function.__name__, launch.arguments, launch.constants)


def use_target(capability: int) -> None:
    """Make this process one that compiles for a compute capability (90 for sm_90), and does nothing else."""
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(TargetDriver(capability))
