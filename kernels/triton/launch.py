"""What a device allows a launch to do."""

from __future__ import annotations

import os
from functools import cache
from typing import Any, NamedTuple

import torch
import triton

PORTABLE_VARIABLE = "VLLM_MILO_PORTABLE"


class LaunchMode(NamedTuple):
    """How kernels are launched.

    Attributes:
        asm: use NVIDIA assembly; ``VLLM_MILO_PORTABLE=1`` forbids it.
        early: launch a kernel before the one before it has ended. It then waits for the other's results by
            itself (``gdc_wait``); what is saved is the launch latency, a quarter of a layer of small experts.
    """

    asm: bool
    early: bool

    def options(self) -> dict[str, Any]:
        """Return the launch options that go with ``early``."""
        return {"launch_pdl": True} if self.early else {}


@cache
def launch_mode(device: torch.device, few_tokens: bool) -> LaunchMode:
    """Return what a device allows (early launches: Hopper and later), and what helps for so many tokens."""
    nvidia = device.type == "cuda" and torch.version.hip is None and os.environ.get(PORTABLE_VARIABLE) != "1"
    early = few_tokens and nvidia and torch.cuda.get_device_capability(device)[0] >= 9
    return LaunchMode(nvidia, early)


@cache
def processors(device: torch.device) -> int:
    """Return the multiprocessors of a GPU; a made-up number in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a tile may take; without a GPU, those of an H100."""
    if device.type != "cuda":
        return 227 * 1024
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])
