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

VARIABLE = "VLLM_MILO_REPLAY"
"""Set to 1, layers of experts are replayed."""
ALIGNED = 256
"""Bytes at whose multiples intermediates begin; torch's allocator has more, and kernels are compiled for 16."""
MOST = 256
"""Recordings that are kept; the oldest goes first."""
Inputs = Sequence["torch.Tensor | None"]
Getter = Callable[[Sequence[Any]], Any]
"""Takes an argument, or a tuple of some, out of a table."""


@cache
def is_wanted() -> bool:
    """Return whether the variable asks for replays: not by default, until they have been timed on a GPU."""
    return os.environ.get(VARIABLE) == "1"


class UnrecordableError(Exception):
    """A call whose launches do not tell all that it does."""


class Launched(NamedTuple):
    """A launch of a recording.

    Attributes:
        run: launches a compiled kernel on a grid; takes the arguments, addresses for tensors.
        getters: of each argument, out of the recording's table.
    """

    run: Callable[..., None]
    getters: list[Getter]


class Entry(NamedTuple):
    """An argument that is no input and not the result.

    Attributes:
        moves: whether it is an intermediate, whose address differs from call to call.
        value: its offset in the intermediates' memory, else the argument.
    """

    moves: bool
    value: Any


class Recording(NamedTuple):
    """The launches of a call that takes some tensors and returns one.

    Attributes:
        launches: in order. The table that they take arguments of holds addresses of the inputs and the result, and
            entries.
        entries: the table's end.
        size: of all intermediates together, bytes.
        shape: of the result.
        dtype: of the result.
    """

    launches: list[Launched]
    entries: list[Entry]
    size: int
    shape: torch.Size
    dtype: torch.dtype

    def replay(self, inputs: Inputs, device: torch.device) -> torch.Tensor:
        """Return the result for inputs of the sizes, types and alignments of the recorded ones."""
        result = torch.empty(self.shape, dtype=self.dtype, device=device)
        memory = torch.empty(self.size, dtype=torch.uint8, device=device)
        start = memory.data_ptr()
        table = [None if one is None else one.data_ptr() for one in inputs]
        table.append(result.data_ptr())
        table += [start + value if moves else value for moves, value in self.entries]
        for run, getters in self.launches:
            run(*[get(table) for get in getters])
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
        self._entries: list[Entry] = []
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
            Launched(compiled[grid + (1,) * (3 - len(grid))], [self._getter(value, returned) for value in arguments])
            for compiled, grid, arguments in self._made
        ]
        return Recording(launches, self._entries, self._size, result.shape, result.dtype)

    def _getter(self, value: Any, returned: int) -> Getter:
        """Return what takes an argument out of the table, tuples whole."""
        if not isinstance(value, tuple):
            return itemgetter(self._place(value, returned))
        getters = [self._getter(one, returned) for one in value]
        return lambda table: tuple([get(table) for get in getters])

    def _place(self, value: Any, returned: int) -> int:
        """Return the place in the table of an argument that is no tuple."""
        if not isinstance(value, torch.Tensor):
            return self._enter(Entry(False, value))
        address, storage = value.data_ptr(), value.untyped_storage()
        if not address:  # no memory at all
            return self._enter(Entry(False, 0))
        if address in self._inputs:
            return self._inputs[address]
        if address == returned:
            return self._number
        base = storage.data_ptr()
        if base in self._storages or base == returned:
            raise UnrecordableError("a launch takes part of an input or of the result")
        if base not in self._starts:
            self._starts[base] = self._size
            self._size += -(-storage.nbytes() // ALIGNED) * ALIGNED
        return self._enter(Entry(True, self._starts[base] + address - base))

    def _enter(self, entry: Entry) -> int:
        self._entries.append(entry)
        return self._number + len(self._entries)


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
    key = key, device, *(None if one is None else _alignment(one) for one in inputs)
    if (recording := _recordings.get(key)) is not None:
        return recording.replay(inputs, device)
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


def _alignment(tensor: torch.Tensor) -> int:
    """Return what Triton compiles a kernel for in an address, and 16 for no memory at all."""
    address = tensor.data_ptr()
    return address % 16 if address else 16
