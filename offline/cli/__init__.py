"""The command line ``milo``."""

from ..threads import load_torch_waiting_quietly

load_torch_waiting_quietly()  # before any module of the command, all of which import torch

from .command import main  # noqa: E402

__all__ = ["main"]
