"""Makes Triton's interpreter (of Triton 3.6) quicker; what it computes, and what it finds wrong, stay the same."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def quicken() -> None:
    """Patch the interpreter, once in a process.

    Most of its time goes into objects that describe types and shapes, and into looking through triton.language.
    """
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patch_once()
    interpreter._get_np_dtype = by_name(interpreter._get_np_dtype)
    core.tensor.__init__ = make_tensor
    core.block_type.__init__ = make_block_type
    core.tuple.__eq__ = is_same_tuple
    TritonSemantic.binary_op_sanitize_overflow_impl = refuse_overflow


def patch_once() -> None:
    """Let the interpreter exchange the language's functions once in a launch.

    It does so when a kernel is launched, and again for every call of another function of the kernel, which then changes
    nothing but takes most of the time. A module of the language that the launch has not changed yet still is.
    """
    real: Callable[[Any], Any] = interpreter._patch_lang
    changed: set[str] = set()  # in the launch that runs

    def patch(function: Any) -> Any:
        seen = modules_of(function)
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


@cache
def modules_of(function: Any) -> frozenset[str]:
    """Return the names of the language's modules that a kernel's function calls something of."""
    language = {interpreter.tl.__name__, interpreter.tl.core.__name__}
    return frozenset(v.__name__ for v in function.__globals__.values() if inspect.ismodule(v)) & language


def by_name(real: Callable[[Any], np.dtype]) -> Callable[[Any], np.dtype]:
    """Return NumPy's dtype of a type by the type's name; ``real`` makes a table of all types for each."""
    known: dict[str, np.dtype] = {}

    def get(dtype: Any) -> np.dtype:
        found = known.get(dtype.name)
        if found is None:
            found = known[dtype.name] = real(dtype)
        return found

    return get


@cache
def shape_of(sizes: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """Return a shape of numbers as block types have it, one of constants as tensors have it, and its product."""
    product = core.constexpr(math.prod(sizes))
    return core.tuple(sizes), core.tuple([core.constexpr(size) for size in sizes]), product


def make_tensor(self: Any, handle: Any, type: Any) -> None:
    """What tensor.__init__ does."""
    sizes = tuple(type.shape.values) if type.is_block() else ()
    _, self.shape, self.numel = shape_of(sizes)
    self.handle, self.type, self.dtype = handle, type, type.scalar


@cache
def block_of(name: str, sizes: tuple[int, ...]) -> tuple[Any, int, str]:
    """Return the shape, the number of elements and the name of a block of what is called ``name``."""
    shape = shape_of(sizes)[0]
    return shape, core.validate_block_shape(sizes), f"<{shape}, {name}>"


def make_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    """What block_type.__init__ does."""
    sizes = tuple(size.value if isinstance(size, core.constexpr) else size for size in shape)
    if not sizes:
        raise TypeError("0d block_type is forbidden")
    self.element_ty = element_ty
    self.shape, self.numel, self.name = block_of(str(element_ty), sizes)


def is_same_tuple(self: Any, other: Any) -> Any:
    """What tuple.__eq__ does, without a tuple made of ``other``."""
    values = other.values if isinstance(other, core.tuple) else other
    return core.constexpr(
        self.values == [value.value if isinstance(value, core.constexpr) else value for value in values]
    )


OPERATORS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}


def refuse_overflow(self: Any, lhs: Any, rhs: Any, binary_op: Callable[..., Any]) -> None:
    """Refuse sums, differences and products of integers that their type has no room for.

    Raises:
        AssertionError: they overflow.
    """
    dtype = lhs.type.scalar
    if dtype.int_bitwidth >= 64 or not self.builder.options.sanitize_overflow:
        return
    found = OPERATORS[binary_op.__name__](lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
    if found.size and (found.min() < dtype.get_int_min_value() or found.max() > dtype.get_int_max_value()):
        raise AssertionError(f"int{dtype.int_bitwidth} overflow detected for operation {binary_op.__name__}")
