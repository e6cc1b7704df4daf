"""The output head in 8 or 4 bits, as the checkpoint contract has it. Pure Python.

The integers lie as compressed-tensors and vLLM's weight-only linear layers have them, so that these serve the head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..shards import TensorEntry
from ..values import CheckpointError, shown

PLAIN_BITS = 16
"""The head is stored as it was."""
HEAD_BITS = (16, 8, 4)
HEAD_WORDS, HEAD_SCALE = "head_words", "head_scale"
HEAD_TENSORS = (HEAD_WORDS, HEAD_SCALE)
HEAD_GROUP = 32
"""Weights along a row that share a scale, in 4 bits; in 8 bits the whole row does."""


def require_head_bits(bits: object) -> None:
    """Raise CheckpointError unless a head can be stored in so many bits."""
    if type(bits) is not int or bits not in HEAD_BITS:
        raise CheckpointError(f"quantization_config.lm_head_bits is {shown(bits)}; supported are {HEAD_BITS}")


def head_groups(bits: int, k: int) -> int:
    """Return how many scales a row of ``k`` weights has."""
    return 1 if bits == 8 else k // HEAD_GROUP


def head_tensors(bits: int, n: int, k: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of what a head [n, k] becomes, by the last parts of their names.

    Raises:
        CheckpointError: groups do not divide k.
    """
    if k % HEAD_GROUP or not n or not k:
        raise CheckpointError(
            f"a head of shape [{n}, {k}] is not stored in {bits} bits: its rows must be a multiple of {HEAD_GROUP}; "
            f"convert the model with --lm-head-bits 16"
        )
    return {HEAD_WORDS: ("I32", (n, k * bits // 32)), HEAD_SCALE: ("F16", (n, head_groups(bits, k)))}


def quantized_heads(tensors: Mapping[str, TensorEntry]) -> dict[str, dict[str, TensorEntry]]:
    """Return the tensors of heads that are stored as integers, by the head's module and then by their last names."""
    heads: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf in HEAD_TENSORS:
            heads.setdefault(module, {})[leaf] = entry
    return heads


def head_shape(found: Mapping[str, TensorEntry], bits: int) -> tuple[int, int]:
    """Return [n, k] of a head by its integers."""
    shape = found[HEAD_WORDS].shape
    return (shape[0], shape[1] * 32 // bits) if len(shape) == 2 else (0, 0)


def head_problems(tensors: Mapping[str, TensorEntry], bits: int) -> Iterator[str]:
    """Yield what of a checkpoint's head is not as ``lm_head_bits`` says, each with tensor, expected and found."""
    heads = quantized_heads(tensors)
    if bits == PLAIN_BITS:
        for module, found in heads.items():
            yield f"{module}.{min(found)}: extra, lm_head_bits does not say that the head is quantized"
        return
    if len(heads) != 1:
        named = ", ".join(sorted(heads)) or "none"
        yield f"lm_head_bits is {bits}, which asks for one head with {' and '.join(HEAD_TENSORS)}; found {named}"
    for module, found in heads.items():
        yield from _problems_of(module, found, tensors, bits)


def _problems_of(
    module: str, found: Mapping[str, TensorEntry], tensors: Mapping[str, TensorEntry], bits: int
) -> Iterator[str]:
    if f"{module}.weight" in tensors:
        yield f"{module}.weight: extra, the head is stored in {bits} bits"
    missing = [leaf for leaf in HEAD_TENSORS if leaf not in found]
    if missing:
        yield f"{module}.{missing[0]}: missing"
        return
    try:
        expected = head_tensors(bits, *head_shape(found, bits))
    except CheckpointError as error:
        yield f"{module}: {error}"
        return
    for leaf, (dtype, shape) in expected.items():
        entry = found[leaf]
        if (entry.dtype, entry.shape) != (dtype, shape):
            yield (
                f"{module}.{leaf}: expected {dtype} {list(shape)} (lm_head_bits {bits}), found {entry.dtype} "
                f"{list(entry.shape)}"
            )
