"""What stands in for a kernel where only the process that compiles it matters."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch


class FakeKernel:
    """Calls a function where Triton would compile."""

    def __init__(self, fn: Callable[..., None]) -> None:
        self.fn = fn

    def warmup(self, *arguments: str, grid: tuple[int, ...], **_: int) -> SimpleNamespace:
        self.fn(*arguments)
        return SimpleNamespace(run=None)


@FakeKernel
def noting(folder: str, owner: str, elsewhere: str) -> None:
    """Write a line about this process to a file of its own, and in others than ``owner`` do what ``elsewhere`` says."""
    line = f"{torch.get_num_threads()} {os.environ.get('CUDA_VISIBLE_DEVICES')!r}"
    with Path(folder, str(os.getpid())).open("a") as file:
        print(line, file=file)
    if elsewhere == "break":
        raise ValueError("does not compile")
    if str(os.getpid()) == owner:
        return
    if elsewhere == "fail":
        raise ValueError("does not compile there")
    if elsewhere == "die":
        os._exit(3)
    if elsewhere == "hang":
        time.sleep(300)
    if elsewhere == "print":
        print("noise", flush=True)
        os.write(1, b"noise\n")
        sys.__stdout__.flush()
