"""How a conversion along a calibration text is laid out in memory, by what is free.

Where the hidden states of the text lie changes nothing in the result, nor do devices that are alike. Rounds do: experts
that are trained one part after the other do not make up for each other's errors within a step. So the number of rounds
is a power of two, as small as memory allows, and a conversion that goes on keeps to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..calibration import memory
from ..calibration.memory import Layout, States
from ..errors import ConversionError
from ..source.reader import ModelReader


def arrange(
    reader: ModelReader,
    windows: torch.Tensor,
    devices: Sequence[torch.device],
    limit: int | None,
    shard_bytes: int,
    disk: int | None,
    rounds: int = 1,
) -> Layout:
    """Return the simplest layout that fits: in few rounds, on few devices, hidden states near by.

    Args:
        reader: the source model.
        windows: of the text, [W, T].
        devices: that the conversion has.
        limit: bytes that it may take on each, or None for what is free.
        shard_bytes: most bytes of a shard of the output.
        disk: bytes free on the disk beside the checkpoint, or None where that is not known.
        rounds: to begin with.

    Raises:
        ConversionError: none fits; with the least need, what there is, and what to do.
    """
    first, tokens = str(devices[0]), windows.numel()
    have = [memory.room(str(device), limit) for device in devices]
    host = memory.available("cpu") - memory.whole_need(reader, 0, first, shard_bytes).host
    beside = {States.DEVICE: None, States.HOST: host, States.DISK: disk or 0}
    for layout in _layouts(memory.most_experts(reader), devices, rounds):
        need = memory.streamed_need(reader, tokens, first, layout)
        further = memory.further_need(reader, first, layout) if layout.devices > 1 else 0
        room = beside[layout.states]
        states_fit = room is None or memory.states_need(reader, tokens, first) <= room
        if need <= have[0] and states_fit and (not further or further <= min(have[1:])):
            return layout
    raise ConversionError(_refusal(reader, windows, first, have[0], limit))


def _layouts(experts: int, devices: Sequence[torch.device], rounds: int) -> Iterator[Layout]:
    on_host = devices[0].type == "cpu"  # whose memory is the device's, and all devices'
    places = [place for place in States if not (on_host and place == States.HOST)]
    numbers = [1] if on_host else sorted({1, len(devices)})
    while True:
        for number in numbers:
            yield from (Layout(place, rounds, number) for place in places)
        if rounds >= experts:
            return
        rounds *= 2


def _refusal(reader: ModelReader, windows: torch.Tensor, device: str, have: int, limit: int | None) -> str:
    """Return what is said where not even one expert of a layer at a time can be trained."""
    least = Layout(rounds=memory.most_experts(reader))
    fit = memory.windows_that_fit(reader, windows.shape[1], have, device, least)
    need = memory.streamed_need(reader, windows.numel(), device, least)
    free = "are free; free some" if limit is None or have < limit else "are allowed (--device-memory); allow more"
    return (
        f"converting with a calibration text takes at least {memory.gib(need)} on {device}, training one expert of a "
        f"layer at a time, and {memory.gib(have)} {free}, or {memory.what_fits(fit)}"
    )
