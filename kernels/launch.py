"""How kernels are launched, or noted to be compiled ahead."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton

PORTABLE_VARIABLE = "VLLM_MILO_PORTABLE"
TOGETHER = (9, 10)
"""Major compute capabilities at which four warps multiply together (wgmma, tcgen05)."""


class LaunchMode(NamedTuple):
    """How kernels are launched.

    Attributes:
        asm: use NVIDIA assembly; ``VLLM_MILO_PORTABLE=1`` forbids it.
        early: launch a kernel before the one before it has ended. It then waits for the other's results by
            itself (``gdc_wait``); what is saved is the launch latency, a quarter of a layer of small experts.
        warps: the device has no MMA of four warps together, so that all products are those of a warp.
    """

    asm: bool
    early: bool
    warps: bool = False

    def options(self) -> dict[str, Any]:
        """Return the launch options that go with ``early``."""
        return {"launch_pdl": True} if self.early else {}


@dataclass(frozen=True)
class Pointer:
    """Stands for a tensor where Triton only compiles: it asks for the element type and an address."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        """Return an address that is a multiple of 16 where the tensor's was."""
        return self.address


class Launch(NamedTuple):
    """A kernel with what it was to be launched with, pointers for tensors."""

    kernel: Any
    arguments: list[Any]
    constants: dict[str, Any]

    def key(self) -> Hashable:
        """Return what launches that share machine code have in common: the kernel, and what it is compiled for."""
        return self.kernel, *self.kinds()

    def kinds(self) -> tuple[Hashable, ...]:
        """Return what Triton compiles the kernel for, by the arguments and by the constants."""
        kinds = (
            _kind(value, parameter.do_not_specialize)
            for parameter, value in zip(self.kernel.params, self.arguments, strict=False)  # constants come after those
        )
        return tuple(kinds), tuple(sorted(self.constants.items()))

    def compile(self) -> None:
        """Compile the kernel for the current device, and load it."""
        _ = self.kernel.warmup(*self.arguments, grid=(1,), **self.constants).run


_keyed: set[int] = set()


def work_out_key(function: Any) -> None:
    """Have Triton work out the key of a kernel in its cache, after the keys of all that the kernel calls.

    Triton 3.6 counts the constants of a called function to a kernel's key only where it knows the function's key, that
    is, where something else that calls it came before: another process, whose kernels come in another order, would not
    find the machine code.
    """
    if id(function) in _keyed or not hasattr(type(function), "cache_key"):
        return
    _keyed.add(id(function))
    for name in function.fn.__code__.co_names:
        work_out_key(function.fn.__globals__.get(name))
    _ = function.cache_key


def _kind(value: Any, any_number: bool) -> Hashable:
    """Return what Triton compiles a kernel for in an argument.

    Of a number that is its width. Unless ``any_number``, it is also whether the number is 1 or a multiple of 16. Within
    a tuple Triton always looks at that, whatever the parameter says.
    """
    if isinstance(value, tuple):
        return tuple(_kind(field, any_number=False) for field in value)
    if isinstance(value, int):
        return value.bit_length() > 31, not any_number and (value == 1, value % 16 == 0)
    return value


def _without_memory(value: Any) -> Any:
    """Return an argument with pointers for tensors."""
    if isinstance(value, torch.Tensor):
        return Pointer(value.dtype, value.data_ptr() % 16)
    if isinstance(value, tuple):
        fields = map(_without_memory, value)
        return type(value)(*fields) if hasattr(value, "_fields") else tuple(fields)
    return value


_noted: ContextVar[dict[Hashable, Launch] | None] = ContextVar("noted launches", default=None)


@contextlib.contextmanager
def noting() -> Iterator[dict[Hashable, Launch]]:
    """Note launches instead of doing them, in this thread: yields those that differ in machine code, by key."""
    noted: dict[Hashable, Launch] = {}
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)


def is_noting() -> bool:
    """Return whether launches of this thread are noted, not done; what libraries compute then means nothing either."""
    return _noted.get() is not None


Listener = Callable[[Any, tuple[int, ...], list[Any]], None]
"""Takes a launch's compiled kernel, its grid, and all arguments in the kernel's order, None for constants."""
_listener: ContextVar[Listener | None] = ContextVar("listener to launches", default=None)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell ``listener`` of the launches that are done in this thread."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], mode: LaunchMode, *arguments: Any, **constants: Any) -> None:
    """Launch a Triton kernel, or note it; ``arguments`` are in its order, ``constants`` hold launch options too."""
    constants |= mode.options()
    noted = _noted.get()
    if noted is None:
        compiled = kernel[grid](*arguments, **constants)
        if (listener := _listener.get()) is not None:
            listener(compiled, grid, [*arguments, *[None] * (len(kernel.arg_names) - len(arguments))])
        return
    work_out_key(kernel)
    made = Launch(kernel, [_without_memory(argument) for argument in arguments], constants)
    noted.setdefault(made.key(), made)


_HERE = contextlib.nullcontext()


def device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which the device of ``tensor`` is the current one, which Triton launches on.

    Without it a kernel for tensors of ``cuda:1`` runs on whatever GPU is current. Where the current one is right
    already, nothing is switched: serving enters this once a layer, also while a CUDA graph is captured.
    """
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)


@cache
def launch_mode(device: torch.device, few_tokens: bool) -> LaunchMode:
    """Return what a device allows (early launches: Hopper and later), and what helps for so many tokens."""
    nvidia = device.type == "cuda" and torch.version.hip is None and os.environ.get(PORTABLE_VARIABLE) != "1"
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" and torch.version.hip is None else 0
    return LaunchMode(nvidia, few_tokens and nvidia and major >= 9, major not in (0, *TOGETHER))


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


@cache
def bandwidth(device: torch.device) -> float:
    """Return the bytes that a GPU's memory moves in a second, by its clock and width; without one, those of an H100.

    Versions of torch that do not say them count as an H100 too.
    """
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    kilohertz = getattr(properties, "memory_clock_rate", 0) or 2_619_000
    bits = getattr(properties, "memory_bus_width", 0) or 5120
    return 2 * kilohertz * 1000 * bits / 8  # twice a cycle
