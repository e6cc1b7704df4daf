"""Makes Triton's interpreter quicker: it looks through triton.language at each call of a function within a kernel."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from triton.runtime import interpreter


def patch_once() -> None:
    """Let the interpreter (of Triton 3.6) exchange the language's functions once in a launch.

    It does so when a kernel is launched, and again for every call of another function of the kernel, which then changes
    nothing but takes most of the time. A module of the language that the launch has not changed yet still is.
    """
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    real: Callable[[Any], Any] = interpreter._patch_lang
    changed: set[str] = set()  # in the launch that runs
    language = {interpreter.tl.__name__, interpreter.tl.core.__name__}

    def patch(function: Any) -> Any:
        seen = {value.__name__ for value in function.__globals__.values() if inspect.ismodule(value)} & language
        if changed and seen <= changed:
            return interpreter._LangPatchScope()
        is_launch = not changed
        changed.update(seen)
        scope = real(function)
        if is_launch:
            restore = scope.restore

            def end() -> None:
                changed.clear()
                restore()

            scope.restore = end
        return scope

    interpreter._patch_lang = patch
