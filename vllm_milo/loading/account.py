"""Where the seconds of a load went: one line in the log once the last layer of a model is ready."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

import torch

logger = logging.getLogger("vllm.milo")

REPACKING, WARMING_UP = "repacking", "warming up"
LINE = (
    "MiLo loaded %d layers in %.2f s: reading %.2f s, repacking %.2f s, warming up %.2f s; "
    "at most %.2f GiB on the device"
)

WIDE_LINE = (
    "MiLo keeps %d dense layers in 16 bits, %d of these in 8 too, for few tokens: %.2f GiB; "
    "VLLM_MILO_DENSE=3bit keeps none, =16bit none in 8"
)
DROPPED_LINE = (
    "%d of these are in 16 bits alone, since 8 would be off by up to %.1f %% of the weights' norm; the first is %s"
)


class Load:
    """The seconds that one model's layers take, from the first that is made to the last that is ready."""

    def __init__(self) -> None:
        self._start = self._made = self._arrived = time.monotonic()
        self._pending: set[str] = set()
        self._ready = 0
        self._spent = {REPACKING: 0.0, WARMING_UP: 0.0}
        self._widened: dict[str, tuple[int, bool, float]] = {}

    def make(self, layer: str) -> None:
        """Note a layer that has been made, by its name."""
        self._pending.add(layer)
        self._made = self._arrived = time.monotonic()

    def arrive(self) -> None:
        """Note that a tensor has been read and copied."""
        self._arrived = time.monotonic()

    @contextlib.contextmanager
    def spend(self, what: str) -> Iterator[None]:
        """Count the seconds of what runs inside, to :data:`REPACKING` or :data:`WARMING_UP`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._spent[what] += time.monotonic() - start

    def widen(self, layer: str, size: int, in_codes: bool, dropped: float) -> None:
        """Note a dense layer that is kept in 16 bits.

        Args:
            layer: its name.
            size: bytes that it takes.
            in_codes: whether it is in 8 bits too.
            dropped: how far these would have been off, where that is why it is not; else 0.
        """
        self._widened[layer] = size, in_codes, dropped

    def finish(self, layer: str) -> bool:
        """Note a layer that is ready; return whether it was the last of the model's.

        A layer that is loaded once more was counted the first time.
        """
        if layer not in self._pending:
            return False
        self._pending.remove(layer)
        self._ready += 1
        return not self._pending

    def seconds(self) -> dict[str, float]:
        """Return what the seconds went on: reading, repacking, warming up, and all since the first layer was made.

        Reading is from the last layer that was made to the last tensor that arrived, whatever lies between. Warming up
        is what it waited for the kernels that repack; those of layers are waited for by the first step.
        """
        now = time.monotonic()
        return {"reading": self._arrived - self._made, **self._spent, "in all": now - self._start}

    def report(self, peak: float) -> None:
        """Log the seconds, and the most GiB that were allocated on the device at once."""
        spent = self.seconds()
        parts = (spent[part] for part in ("in all", "reading", REPACKING, WARMING_UP))
        logger.info(LINE, self._ready, *parts, peak)
        if self._widened:
            sizes, in_codes, _ = zip(*self._widened.values(), strict=True)
            logger.info(WIDE_LINE, len(sizes), sum(in_codes), sum(sizes) / 2**30)
            if dropped := {layer: off for layer, (*_, off) in self._widened.items() if off}:
                logger.info(DROPPED_LINE, len(dropped), 100 * max(dropped.values()), next(iter(dropped)))


_current = Load()


def current() -> Load:
    """Return the load that is under way, or was last."""
    return _current


def make(layer: str) -> None:
    """Note a layer that has been made; the first after a load that is complete begins another."""
    global _current
    if not _current._pending:
        _current = Load()
    _current.make(layer)


def finish(layer: str, device: torch.device) -> None:
    """Note a layer that is ready; after the model's last one wait for the device, and log the seconds.

    Args:
        layer: its name.
        device: of the layer.
    """
    load = current()
    if not load.finish(layer):
        return
    peak = 0.0
    if device.type == "cuda":
        with load.spend(REPACKING):  # which was launched, and may not be done
            torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) / 2**30
    load.report(peak)
