"""Launches that a call has made, made once more by calls of the same sizes with other tensors.

A layer of experts decides, allocates and launches anew in every call. While tokens are few a CUDA graph holds all that.
Steps that read prompts are in no graph, and the host may take longer for them than the GPU does. What a layer decides
depends on sizes, types and alignments, and all layers of a step have the same: so one of them is recorded, and the
others' launches differ from its own in addresses only. Intermediates come as one piece of memory.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from ..launch import is_noting, listening
from ..sizes import cdiv

VARIABLE = "VLLM_MILO_REPLAY"
"""Set to 0, layers of experts are not replayed."""
ALIGNED = 256
"""Bytes at whose multiples intermediates begin; torch's allocator has more, and Triton asks for less."""
ALIGNMENT = 16
"""Bytes at whose multiples an address is aligned, to Triton."""
MOST = 256
"""Recordings that are kept; the oldest goes first."""
Inputs = Sequence["torch.Tensor | None"]
Getter = Callable[[Sequence[Any]], Any]
"""Gives an argument, or a tuple of some, by a table of addresses and constants."""


@cache
def is_wanted() -> bool:
    """Return whether layers are replayed, which :data:`VARIABLE` forbids."""
    return os.environ.get(VARIABLE) != "0"


class UnrecordableError(Exception):
    """A call whose launches do not tell all that it does."""


class Launched(NamedTuple):
    """A launch of a recording.

    Attributes:
        run: launches a compiled kernel on a grid; takes the arguments, addresses for tensors.
        arguments: gives all of them, by the recording's table.
    """

    run: Callable[..., None]
    arguments: Getter


class Recording(NamedTuple):
    """The launches of a call that takes some tensors and returns one.

    Attributes:
        launches: in order. The table that they take arguments of holds addresses, the inputs', the result's, and those
            of intermediates, and at its end the constants.
        offsets: of intermediates, bytes from where their memory begins.
        constants: arguments that are no addresses, the last one first.
        size: of that memory.
        shape: of the result.
        dtype: of the result.
    """

    launches: list[Launched]
    offsets: list[int]
    constants: list[Any]
    size: int
    shape: torch.Size
    dtype: torch.dtype

    def replay(self, addresses: Sequence[int | None], device: torch.device) -> torch.Tensor:
        """Return the result for inputs, by their addresses, of the recorded ones' sizes, types and alignments."""
        result = torch.empty(self.shape, dtype=self.dtype, device=device)
        memory = torch.empty(self.size, dtype=torch.uint8, device=device)
        start = memory.data_ptr()
        table = [*addresses, result.data_ptr(), *[start + offset for offset in self.offsets], *self.constants]
        for run, arguments in self.launches:
            run(*arguments(table))
        return result


class Recorder:
    """Notes the launches of a call that takes ``inputs``, and where their arguments come from."""

    def __init__(self, inputs: Inputs) -> None:
        known = [(index, one) for index, one in enumerate(inputs) if one is not None]
        self._inputs = {one.data_ptr(): index for index, one in known}
        self._alike = len(self._inputs) < len({index if one.data_ptr() else -1 for index, one in known})
        self._storages = {one.untyped_storage().data_ptr() for _, one in known}
        self._number = len(inputs)
        self._starts: dict[int, int] = {}
        self._size = 0
        self._offsets: list[int] = []
        self._constants: list[Any] = []
        # tensors among them: while they live no other takes their memory
        self._made: list[tuple[Any, tuple[int, ...], Sequence[Any]]] = []

    def note(self, compiled: Any, grid: tuple[int, ...], arguments: Sequence[Any]) -> None:
        """Note a launch; ``arguments`` are all of the kernel's, in its order."""
        self._made.append((compiled, grid, arguments))

    def recording(self, result: torch.Tensor) -> Recording:
        """Return the recording of the call, which returned ``result``.

        Raises:
            UnrecordableError: inputs are at the same place, a launch takes part of one, the last launch does not write
                the result, or kernels were not compiled, as in the interpreter.
        """
        if self._alike:
            raise UnrecordableError("which of two inputs a launch takes is not known")
        if not all(hasattr(compiled, "packed_metadata") for compiled, *_ in self._made):
            raise UnrecordableError("kernels are not compiled here")
        returned = result.data_ptr()
        if returned in self._inputs or not any(_is_at(value, returned) for value in self._made[-1][2]):
            raise UnrecordableError("the last launch does not write the result")
        launches = [
            Launched(compiled[grid + (1,) * (3 - len(grid))], self._getter(arguments, returned))
            for compiled, grid, arguments in self._made
        ]
        constants = self._constants[::-1]
        return Recording(launches, self._offsets, constants, self._size, result.shape, result.dtype)

    def _getter(self, values: Sequence[Any], returned: int) -> Getter:
        """Return what gives values as a tuple, whose own tuples are whole."""
        if len(values) > 1 and not any(isinstance(value, tuple) for value in values):
            return itemgetter(*[self._place(value, returned) for value in values])  # no Python runs where it is called
        getters = [
            self._getter(value, returned) if isinstance(value, tuple) else itemgetter(self._place(value, returned))
            for value in values
        ]
        return lambda table: tuple([get(table) for get in getters])

    def _place(self, value: Any, returned: int) -> int:
        """Return an argument's place in the table, a constant's from its end."""
        if isinstance(value, torch.Tensor) and value.data_ptr():
            return self._address(value, returned)
        self._constants.append(0 if isinstance(value, torch.Tensor) else value)  # a tensor without memory
        return -len(self._constants)

    def _address(self, value: torch.Tensor, returned: int) -> int:
        """Return the place of a tensor's address in the table."""
        address, storage = value.data_ptr(), value.untyped_storage()
        if address in self._inputs:
            return self._inputs[address]
        if address == returned:
            return self._number
        base = storage.data_ptr()
        if base in self._storages or base == returned:
            raise UnrecordableError("a launch takes part of an input or of the result")
        if base not in self._starts:
            self._starts[base] = self._size
            self._size += cdiv(storage.nbytes(), ALIGNED) * ALIGNED
        self._offsets.append(self._starts[base] + address - base)
        return self._number + len(self._offsets)


def _is_at(value: Any, address: int) -> bool:
    """Return whether an argument, or one of a tuple, is a tensor at an address."""
    if isinstance(value, tuple):
        return any(_is_at(one, address) for one in value)
    return isinstance(value, torch.Tensor) and value.data_ptr() == address


_recordings: dict[Hashable, Recording | None] = {}
_adding = threading.Lock()
"""Threads of one process, as micro-batches have, read freely and add one after the other."""


def replayed(call: Callable[[], torch.Tensor], key: Hashable, inputs: Inputs, device: torch.device) -> torch.Tensor:
    """Return what ``call`` returns: by its launches where a call of the same key has made them, else by calling it.

    Args:
        call: makes launches (:func:`..launch.launch`) and allocates, and does nothing else on the device.
        key: what its launches depend on, apart from addresses: alignments are added here.
        inputs: the tensors that it takes.
        device: of all of them, the current one.
    """
    if is_noting():
        return call()
    addresses = [None if one is None else one.data_ptr() for one in inputs]
    key = key, device, *map(_alignment, addresses)
    if (recording := _recordings.get(key)) is not None:
        return recording.replay(addresses, device)
    if key in _recordings:
        return call()
    recorder = Recorder(inputs)
    with listening(recorder.note):
        result = call()
    try:
        made = recorder.recording(result)
    except UnrecordableError:
        made = None
    with _adding:
        while len(_recordings) >= MOST:
            del _recordings[next(iter(_recordings))]
        _recordings[key] = made
    return result


def _alignment(address: int | None) -> int | None:
    """Return what Triton compiles a kernel for in an address, and 16 for no memory at all; None without a tensor."""
    if address is None:
        return None
    return address % ALIGNMENT if address else ALIGNMENT
