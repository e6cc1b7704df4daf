"""What a model's ``quantization_config`` says of how its matrices are stored; it may be a stranger's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vllm_milo.values import shown, shown_name

from ...errors import ConversionError
from .scheme import Format, Scheme
from .table import FINE_FP8, FLOAT, INT8, MXFP4, MXFP4_EXPERTS, OWN_FP4, OWN_FP8, PACKED, PLAIN_FP8

Config = Mapping[str, Any]
_FURTHER = (("sparsity_config", "format", "dense"), ("transform_config", "config_groups", None))
"""What else compressed-tensors may do to weights: its key, the key in it that tells, and its value for nothing."""
_MOST_GROUPS = 100
_LARGEST_BLOCK = 2**24
_FP8_NAMES = (None, "e4m3", "float8_e4m3fn")
_DEEPSEEK = ("deepseek_v4",)
"""Model types whose makers' FP8 and FP4 files have scales of other names and types."""
_DEEPSEEK_METHODS = ("fp8", "deepseek_v4_fp8")
_DEEPSEEK_EXPERTS = r"re:.*\.experts\.\d+\.w[123]"
"""Their matrices that may be in FP4, those of what predicts further tokens among them."""


class _Kind(NamedTuple):
    """What a format of compressed-tensors holds: its numbers' type, their bits, and what may share a scale."""

    format: Format
    type: str
    bits: tuple[int, ...]
    strategies: tuple[str, ...]


_FLOAT_STRATEGIES = ("tensor", "channel", "group", "block")
_COMPRESSED = {
    ("float-quantized", "float"): _Kind(FLOAT, "float", (8,), _FLOAT_STRATEGIES),
    ("naive-quantized", "float"): _Kind(FLOAT, "float", (8,), _FLOAT_STRATEGIES),
    ("int-quantized", "int"): _Kind(INT8, "int", (8,), ("tensor", "channel")),
    ("pack-quantized", "int"): _Kind(PACKED, "int", (4, 8), ("channel", "group")),
    ("mxfp4-pack-quantized", "float"): _Kind(MXFP4, "float", (4,), ("group",)),
}
"""By compressed-tensors' names of a format and of the type of numbers."""
KNOWN = (
    "16 bits, float32, FP8 e4m3 (quant_method fp8), with FP4 as DeepSeek-V4 has it, gpt-oss's MXFP4 (quant_method "
    "mxfp4), and compressed-tensors' " + ", ".join(dict.fromkeys(name for name, _ in _COMPRESSED)) + " of 4 or 8 bits"
)
"""The formats that are read, for messages."""


def find_schemes(config: Config, path: Path) -> tuple[Scheme, ...]:
    """Return how a model's matrices may be stored, by its config.json; nothing where they are in 16 bits or more.

    A ``quantization_config`` that is null, as some tools write it, means none.

    Args:
        config: what the file holds.
        path: of the file, for messages.

    Raises:
        ConversionError: says what is not known, and what is.
    """
    stated = config.get("quantization_config")
    if stated is None:
        return ()
    method = stated.get("quant_method") if isinstance(stated, Mapping) else stated
    if method in _DEEPSEEK_METHODS and config.get("model_type") in _DEEPSEEK:
        return _read_deepseek(stated, config, path)
    known = _METHODS.get(method) if isinstance(method, str) else None
    if known is None:
        name = method if isinstance(method, str) and method.isidentifier() else shown(method)
        raise ConversionError(f"{path}: the model is quantized already ({name}); {advice()}")
    return known(stated, path)


def advice() -> str:
    """Return what to do with a model in a format that is not read."""
    return f"convert the original, or a copy in a format that is read: {KNOWN}"


def _read_fp8(stated: Config, path: Path) -> tuple[Scheme, ...]:
    """Read what DeepSeek's and others' own code writes, and transformers'."""
    if stated.get("fmt") not in _FP8_NAMES:
        raise _unknown(path, f"fmt is {shown(stated['fmt'])}, which is not e4m3")
    block = stated.get("weight_block_size")
    if block is None:
        return (Scheme(PLAIN_FP8, (None, None)),)
    return (Scheme(FINE_FP8, _sides(block, path, "weight_block_size")),)


def _read_deepseek(stated: Config, config: Config, path: Path) -> tuple[Scheme, ...]:
    """Read what DeepSeek-V4's makers publish: FP8 in blocks, and routed experts in FP4 where ``expert_dtype`` says so.

    By vLLM's reader (vllm/models/deepseek_v4/quant_config.py), which takes a missing ``expert_dtype`` for FP4 too.
    """
    block, algorithm = stated.get("weight_block_size"), stated.get("moe_quant_algo")
    if block is None:
        raise _unknown(path, f"weight_block_size is missing, which {config['model_type']}'s FP8 matrices have")
    if algorithm:
        raise _unknown(path, f"moe_quant_algo is {shown(algorithm)}, whose experts are not read")
    fine = Scheme(OWN_FP8, _read_fp8(stated, path)[0].block, targets=("Linear",))
    experts = config.get("expert_dtype", "fp4")
    if experts == "fp8":
        return (fine,)
    if experts != "fp4":
        raise ConversionError(f"{path}: expert_dtype is {shown(experts)}, not fp4 or fp8; {advice()}")
    return (fine, Scheme(OWN_FP4, (1, 32), bits=4, targets=(_DEEPSEEK_EXPERTS,)))


def _read_experts(stated: Config, path: Path) -> tuple[Scheme, ...]:
    """Read what OpenAI publishes gpt-oss in: experts in MXFP4, all else in 16 bits."""
    return (Scheme(MXFP4_EXPERTS, (1, 32), bits=4),)


def _read_compressed(stated: Config, path: Path) -> tuple[Scheme, ...]:
    """Read what compressed-tensors writes: a scheme for each group of modules."""
    for key, part, plain in _FURTHER:
        further = stated.get(key)
        found = further.get(part) if isinstance(further, Mapping) else further
        if found and found != plain:
            raise _unknown(path, f"{key} is {shown(further)}, which changes what weights are")
    groups = stated.get("config_groups")
    if not isinstance(groups, Mapping) or not 0 < len(groups) <= _MOST_GROUPS:
        raise _unknown(path, f"config_groups must be an object of groups of modules, found {shown(groups)}")
    named = ((f"config_groups.{shown_name(name)}", group) for name, group in groups.items())
    return tuple(_read_group(stated, group, where, path) for where, group in named)


def _read_group(stated: Config, group: Any, where: str, path: Path) -> Scheme:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise _unknown(path, f"{where}.weights must be an object, found {shown(weights)}")
    name, kind_of = group.get("format") or stated.get("format"), weights.get("type", "int")
    kind = _COMPRESSED.get((name, kind_of)) if isinstance(name, str) and isinstance(kind_of, str) else None
    if kind is None:
        raise _unknown(path, f"{where} is in the format {shown(name)} of the type {shown(kind_of)}")
    bits, symmetric = weights.get("num_bits", 8), weights.get("symmetric", True)
    if bits not in kind.bits or isinstance(bits, bool | float):
        raise _unknown(path, f"{where}.weights.num_bits is {shown(bits)}; of {name} {kind.bits} are read")
    if symmetric is not True and (symmetric is not False or kind.format.zero is None):
        raise _unknown(path, f"{where}.weights.symmetric is {shown(symmetric)}, which {name} is not read with")
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise _unknown(path, f"{where}.targets must be a list of names, found {shown(targets)}")
    block = _block(weights, kind, where, path)
    if kind.format is MXFP4 and block != (1, 32):
        raise _unknown(path, f"{where}.weights.group_size is {shown(block[1])}; {name} has groups of 32")
    name = kind.format.name.replace("INT ", f"INT{bits} ")
    return Scheme(kind.format._replace(name=name), block, bits, symmetric, tuple(targets))


def _block(weights: Config, kind: _Kind, where: str, path: Path) -> tuple[int | None, int | None]:
    """Return the rows and columns that share a scale."""
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if strategy not in kind.strategies:
        found = f"{where}.weights.strategy is {shown(strategy)}"
        raise _unknown(path, f"{found}; of {kind.format.name} {', '.join(kind.strategies)} are read")
    if strategy == "block":
        block = weights.get("block_structure")
        if isinstance(block, str) and re.fullmatch(r"[0-9]{1,8}x[0-9]{1,8}", block):  # as older versions wrote it
            block = [int(side) for side in block.split("x")]
        return _sides(block, path, f"{where}.weights.block_structure")
    if strategy == "group":
        return _sides([1, size], path, f"{where}.weights.group_size")
    return (1, None) if strategy == "channel" else (None, None)


def _sides(block: Any, path: Path, where: str) -> tuple[int, int]:
    whole = isinstance(block, list) and all(type(side) is int and 0 < side <= _LARGEST_BLOCK for side in block)
    if not whole or len(block) != 2:
        raise _unknown(path, f"{where} must be the sizes of a block, found {shown(block)}")
    return block[0], block[1]


def _unknown(path: Path, what: str) -> ConversionError:
    return ConversionError(f"{path}: quantization_config: {what}; {advice()}")


_METHODS: dict[str, Callable[[Config, Path], tuple[Scheme, ...]]] = {
    "fp8": _read_fp8,
    "compressed-tensors": _read_compressed,
    "mxfp4": _read_experts,
}
"""Readers of a ``quantization_config``, by its ``quant_method``."""
