"""Iterates over what a stage works on, and lets it be seen."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import TypeVar

from .log import active_log
from .stage import Stage
from .views import Bar, Lines, Logged, View, ticking

Item = TypeVar("Item")


class _Watched:
    """A stage and those that show it."""

    def __init__(self, stage: Stage, views: Sequence[View]) -> None:
        self.stage, self.views = stage, views


_current: ContextVar[_Watched | None] = ContextVar("stage", default=None)


def progress_bar(
    items: Sequence[Item], what: str, progress: bool, unit: str = "layer", sizes: Sequence[float] | None = None
) -> Iterator[Item]:
    """Iterate over ``items``; show on stderr, and log where events are recorded, how far that is and what is left.

    Args:
        items: of the stage; where they have a ``name``, it is shown.
        what: the stage's name.
        progress: show anything on stderr at all.
        unit: what an item is called.
        sizes: how much work each item is, where they differ; the time that lines state goes by it.
    """
    log = active_log()
    if not progress and log is None:
        return iter(items)
    stage = Stage(what, unit, [1.0] * len(items) if sizes is None else sizes, time.monotonic())
    views: list[View] = []
    if progress:
        views.append(Bar(stage) if sys.stderr.isatty() else Lines(stage))
    if log is not None:
        views.append(Logged(stage, log))
    return _watched(items, _Watched(stage, views))


def within(items: Sequence[Item], what: str, unit: str = "step") -> Iterator[Item]:
    """Iterate over a part of the work on one item of the stage that runs, which shows how far that is; else just so."""
    watched = _current.get()
    if watched is None:
        return iter(items)
    return _inside(items, watched, Stage(what, unit, [1.0] * len(items), time.monotonic()))


def doing(what: str, name: str = "") -> None:
    """Say what is done with the item of the stage that runs, and with which matrix of it; nothing without a stage."""
    watched = _current.get()
    if watched is not None:
        watched.stage.inside = Stage(f"{what} {name}".rstrip(), "", (), time.monotonic())
        _changed(watched)


def _watched(items: Sequence[Item], watched: _Watched) -> Iterator[Item]:
    stage, before = watched.stage, _current.get()
    with contextlib.ExitStack() as stack:
        for view in watched.views:
            stack.callback(view.close)
            stack.enter_context(ticking(view))
        _current.set(watched)
        stack.callback(lambda: _current.set(before))
        for item in items:
            stage.begin(_name(item))
            _changed(watched)
            yield item
            name = stage.item
            stage.advance(time.monotonic())
            for view in watched.views:
                view.advanced(name)


def _inside(items: Sequence[Item], watched: _Watched, stage: Stage) -> Iterator[Item]:
    watched.stage.inside = stage
    for item in items:
        _changed(watched)
        yield item
        stage.advance(time.monotonic())


def _changed(watched: _Watched) -> None:
    for view in watched.views:
        view.changed()


def _name(item: object) -> str:
    name = getattr(item, "name", "")
    return name if isinstance(name, str) else ""
