"""Check a MiLo checkpoint folder against its ``quantization_config``, from file headers alone.

The plugin runs this before vLLM allocates anything, the converter after it has written, so that a missing,
extra or wrongly shaped tensor is one clear error instead of garbage text. Pure Python.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from .checkpoint import (
    BASE_TENSORS,
    PACKED,
    TENSOR_NAMES,
    CheckpointError,
    MiLoFormat,
    TensorSpec,
    split_expert_name,
)
from .dtypes import DTYPES, safetensors_name
from .head.layout import head_problems
from .names import EXPERT_PROJECTIONS, FUSED_LAYERS, leaf_of
from .shards import TensorEntry, read_object, read_tensors
from .values import shown_name

_SHOWN_PROBLEMS = 5
_MOST_MISSING = 100
"""Problems of one layer's experts."""
FUSED_EXPERTS = ("gate_up_proj", "down_proj")
"""Names of the 3-D tensors that hold all experts of a layer, in some checkpoints and where transformers runs them."""
_UNFUSED_BLOCK = "block_sparse_moe"
"""Block of families whose experts vLLM calls w1, w2 and w3. It passes over their fused tensors without a word."""
_TEXT_PARTS = ("thinker_config", "text_config")
"""Keys of config.json of the part for the text model, or of one that has it, where that is part of a larger model."""
_SIZES = (
    ("num_experts", "num_local_experts"),
    ("moe_latent_size", "hidden_size"),
    ("moe_intermediate_size", "intermediate_size"),
)
"""Keys of config.json, the first that is there, of the sizes of routed experts."""
_UNGATED = ("mlp_hidden_act", "relu2")
"""Key of config.json and its value that say that experts, as all FFNs of such models, have no gate."""


def read_format(folder: Path) -> tuple[MiLoFormat, Mapping[str, Any]]:
    """Return the format and the whole config.json of a MiLo checkpoint.

    Raises:
        CheckpointError: the folder is not a MiLo checkpoint, or its format is not supported.
    """
    config = read_object(folder / "config.json")
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "milo":
        raise CheckpointError(f"{folder}: not a MiLo checkpoint; make one with `milo quantize {folder} -o OUT`")
    try:
        return MiLoFormat.from_dict(quantization), config
    except CheckpointError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None


def quantized_modules(tensors: Mapping[str, TensorEntry]) -> dict[str, dict[str, TensorEntry]]:
    """Return the tensors of each quantized matrix, by module name and then by tensor name."""
    modules: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    for full_name, entry in tensors.items():
        module, _, tensor = full_name.rpartition(".")
        if tensor in TENSOR_NAMES:
            modules[module][tensor] = entry
    return dict(modules)


def matrix_shape(tensors: Mapping[str, TensorEntry]) -> tuple[int, int]:
    """Return [N, K] of a quantized matrix from its packed codes."""
    shape = tensors[PACKED].shape
    return (shape[0], shape[1] * 32 // 3) if len(shape) == 2 else (0, 0)


def validate_checkpoint(folder: Path) -> MiLoFormat:
    """Check every tensor of a MiLo checkpoint and return its format.

    Raises:
        CheckpointError: the folder breaks the format; the message lists the first problems, each with
            tensor, expected and found.
        ShardError: a file is missing, truncated or unreadable.
    """
    fmt, config = read_format(folder)
    problems = find_problems(read_tensors(folder), fmt, config)
    if problems:
        raise CheckpointError(
            f"{folder}: the checkpoint breaks format_version 1; convert it again or restore the files:\n  "
            + "\n  ".join(first_problems(problems))
        )
    return fmt


def find_problems(tensors: Mapping[str, TensorEntry], fmt: MiLoFormat, config: Mapping[str, Any]) -> list[str]:
    """Return what in the tensors of a checkpoint breaks its format, each with tensor, expected and found.

    The converter asks this of the tensors that it is going to write, before it computes any of them.

    Args:
        tensors: all of the checkpoint, by name.
        fmt: its format.
        config: its config.json, for the model's dtype.
    """
    modules = quantized_modules(tensors)
    dtype = _model_dtype(config)
    experts = count_experts(modules)
    return [
        *_expert_problems(modules, experts, config),
        *_joint_group_problems(modules, experts, fmt),
        *(p for name, found in modules.items() for p in _matrix_problems(name, found, fmt, experts, dtype)),
        *_unquantized_problems(tensors, modules, fmt),
        *_kept_expert_problems(tensors, modules, fmt, config),
        *_fused_problems(modules, fmt),
        *_table_problems(modules, experts, fmt),
        *head_problems(tensors, fmt.lm_head_bits),
    ]


def _model_dtype(config: Mapping[str, Any]) -> str:
    """Return the dtype that config.json states, or else its part for the text model; bfloat16 where neither does."""
    part: Any = config
    while isinstance(part, Mapping):
        stated = safetensors_name(str(part.get("dtype", part.get("torch_dtype"))))
        if stated is not None:
            return stated
        part = next((part[key] for key in _TEXT_PARTS if key in part), None)
    return "BF16"


def first_problems(problems: Sequence[str]) -> list[str]:
    """Return the first of many problems, and how many more there are."""
    more = len(problems) - _SHOWN_PROBLEMS
    return [*problems[:_SHOWN_PROBLEMS], *([f"… and {more} more"] if more > 0 else [])]


def module_rank(name: str, fmt: MiLoFormat, experts: Mapping[str, int]) -> int:
    """Return the rank that the table gives to a matrix; ``experts`` is what :func:`count_experts` returns."""
    expert = split_expert_name(name)
    if expert is None:
        return fmt.ranks.of_module(name)
    layer, index, projection = expert
    return fmt.ranks.of_expert(layer, projection, index, experts[layer])


def count_experts(modules: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of experts of each layer's experts (one more than the largest index)."""
    counts: dict[str, int] = defaultdict(int)
    for name in modules:
        expert = split_expert_name(name)
        if expert is not None:
            counts[expert[0]] = max(counts[expert[0]], expert[1] + 1)
    return dict(counts)


def experts_of(tensors: Mapping[str, TensorEntry]) -> set[str]:
    """Return the names of all modules of routed experts, quantized or not."""
    return {*count_experts(quantized_modules(tensors)), *kept_experts(tensors)}


def modules_of(tensors: Mapping[str, TensorEntry]) -> set[str]:
    """Return the names of all modules that have a weight, quantized or not, but for routed experts."""
    weights = (".weight", f".{PACKED}")
    modules = {name.rpartition(".")[0] for name in tensors if name.endswith(weights)}
    return {module for module in modules if split_expert_name(module) is None}


def is_fused_experts(tensor: str) -> bool:
    """Return whether a tensor, by its name, holds one or two matrices of every expert of a layer."""
    module, _, leaf = tensor.rpartition(".")
    return leaf in FUSED_EXPERTS and leaf_of(module) == "experts"


def kept_experts(tensors: Mapping[str, TensorEntry]) -> dict[str, dict[str, TensorEntry]]:
    """Return the tensors of routed experts that are stored unquantized, by the experts' module and the name in it.

    The names are ``3.gate_proj.weight``, or ``gate_up_proj`` where the experts are fused.
    """
    kept: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    for name, entry in tensors.items():
        module, _, leaf = name.rpartition(".")
        expert = split_expert_name(module) if leaf == "weight" else None
        if expert is not None:
            kept[expert[0]][f"{expert[1]}.{expert[2]}.weight"] = entry
        elif is_fused_experts(name):
            kept[module][leaf] = entry
    return dict(kept)


def _matrix_problems(
    name: str,
    found: Mapping[str, TensorEntry],
    fmt: MiLoFormat,
    experts: Mapping[str, int],
    model_dtype: str,
) -> Iterator[str]:
    if fmt.ignores(name):
        yield f"{name}: is in ignore but has quantized tensors"
    missing = [tensor for tensor in BASE_TENSORS if tensor not in found]
    if missing:
        yield f"{name}.{missing[0]}: missing"
        return
    n, k = matrix_shape(found)
    group_size = fmt.module_group_size(name)
    try:
        fmt.check_matrix(name, n, k, group_size)
        rank = module_rank(name, fmt, experts)
    except CheckpointError as error:
        yield str(error)
        return
    expected = fmt.base_tensors(n, k, group_size) | fmt.factor_tensors(n, k, rank, model_dtype)
    yield from _tensor_problems(name, rank, group_size, expected, found)


def _tensor_problems(
    name: str, rank: int, group_size: int, expected: Mapping[str, TensorSpec], found: Mapping[str, TensorEntry]
) -> Iterator[str]:
    for tensor in sorted(expected.keys() | found.keys()):
        if tensor not in found:
            yield f"{name}.{tensor}: missing, but the rank table gives this matrix rank {rank}"
        elif tensor not in expected:
            yield f"{name}.{tensor}: extra, the rank table gives this matrix rank {rank}"
        elif (found[tensor].dtype, found[tensor].shape) != expected[tensor]:
            dtype, shape = expected[tensor]
            by = f"group size {group_size}" if tensor in BASE_TENSORS else f"rank {rank}"
            yield (
                f"{name}.{tensor}: expected {dtype} {list(shape)} ({by}), "
                f"found {found[tensor].dtype} {list(found[tensor].shape)}"
            )


def _expert_problems(
    modules: Mapping[str, Any], experts: Mapping[str, int], config: Mapping[str, Any]
) -> Iterator[str]:
    """Every expert must hold the same projections, one of each role."""
    key, value = _UNGATED
    roles, said = ["down", "gate", "up"], "a gate, an up and a down projection"
    if config.get(key) == value:
        roles, said = ["down", "up"], f"an up and a down projection alone, by config.json's {key} {value}"
    projections: dict[str, set[str]] = defaultdict(set)
    for name in modules:
        expert = split_expert_name(name)
        if expert is not None:
            projections[expert[0]].add(expert[2])
    for layer, count in experts.items():
        names = sorted(projections[layer])
        if sorted(EXPERT_PROJECTIONS.get(name, name) for name in names) != roles:
            yield f"{layer}: expected {said}, found {names}"
        every = (f"{layer}.{index}.{projection}" for index in range(count) for projection in names)
        missing = (name for name in every if name not in modules)
        for name in islice(missing, _MOST_MISSING):  # a name may state any number of experts
            yield f"{name}: missing ({count} experts)"


def _joint_group_problems(modules: Mapping[str, Any], experts: Iterable[str], fmt: MiLoFormat) -> Iterator[str]:
    """One GEMM computes gate and up projections, in one group size."""
    for layer in experts:
        gate, up = (fmt.groups.of_experts(layer, projection, fmt.group_size) for projection in ("w1", "w3"))
        has_gate = any(f"{layer}.0.{name}" in modules for name, role in EXPERT_PROJECTIONS.items() if role == "gate")
        if has_gate and gate != up:
            yield f"{layer}: group_sizes gives the gate projections groups of {gate} and the up projections of {up}"


def _unquantized_problems(
    tensors: Mapping[str, TensorEntry], modules: Mapping[str, Any], fmt: MiLoFormat
) -> Iterator[str]:
    for full_name, entry in tensors.items():
        module, _, tensor = full_name.rpartition(".")
        if entry.dtype not in DTYPES:
            yield f"{full_name}: is {entry.dtype}; tensors must be one of {', '.join(DTYPES)}"
        if module in modules:
            if tensor not in (*TENSOR_NAMES, "bias"):
                yield f"{full_name}: extra, this matrix is quantized"
            continue
        is_matrix = tensor == "weight" and len(entry.shape) == 2 and ".layers." in module
        expert = split_expert_name(module)
        if expert is not None or is_fused_experts(full_name):
            experts = module if expert is None else expert[0]
            if not fmt.ignores(experts):
                yield f"{full_name}: stored unquantized, but ignore does not name {experts}"
        elif is_matrix and not fmt.ignores(module):
            yield f"{full_name}: stored unquantized, but ignore does not name it"


def _kept_expert_problems(
    tensors: Mapping[str, TensorEntry], modules: Mapping[str, Any], fmt: MiLoFormat, config: Mapping[str, Any]
) -> Iterator[str]:
    """Experts that ignore names must be there unquantized, whole, and of the model's sizes: vLLM would not say so."""
    kept = kept_experts(tensors)
    quantized = count_experts(modules)
    yield from (f"{name}: is in ignore but has quantized experts" for name in quantized if fmt.ignores(name))
    for name in tensors:
        experts = f"{name.removesuffix('.gate.weight')}.experts"  # every layer with experts has a router
        if name.endswith(".gate.weight") and fmt.ignores(experts) and experts not in kept and experts not in quantized:
            yield f"{experts}: missing, neither quantized nor as ignore says"
    for experts, found in kept.items():
        if experts in quantized:
            yield f"{experts}: some of its experts are quantized and some are not"
            continue
        yield from _fused_expert_problems(experts, found, config)
        each = {f"{experts}.{name.removesuffix('.weight')}": entry for name, entry in found.items() if "." in name}
        if each and len(each) < len(found):
            yield f"{experts}: holds experts both fused and one by one"
        if each:
            yield from _expert_problems(each, count_experts(each), config)
            yield from _each_expert_problems(experts, each, config)


def _fused_expert_problems(experts: str, found: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> Iterator[str]:
    """Fused experts are two tensors, [E, 2·I, H] and [E, H, I], in families where vLLM reads them."""
    fused = {name: entry for name, entry in found.items() if "." not in name}
    if fused and leaf_of(experts.rpartition(".")[0]) == _UNFUSED_BLOCK:
        yield (
            f"{experts}.{min(fused)}: vLLM does not read fused experts of this family; quantize them, or save the "
            f"model with transformers' save_pretrained, which stores each expert by itself, and convert that"
        )
    for name in sorted(set(FUSED_EXPERTS) - set(fused)) if fused else ():
        yield f"{experts}.{name}: missing"
    number, hidden, inner = _stated_sizes(config)
    for name, entry in fused.items():
        expected = (
            (number, 2 * inner if inner else None, hidden) if name == FUSED_EXPERTS[0] else (number, hidden, inner)
        )
        if not _has_shape(entry, expected):
            yield _wrong_shape(f"{experts}.{name}", entry, expected)


def _each_expert_problems(experts: str, each: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> Iterator[str]:
    """Matrices of single experts are [I, H], those of down projections [H, I]."""
    number, hidden, inner = _stated_sizes(config)
    count = count_experts(each)[experts]
    if number is not None and count != number:
        yield f"{experts}: holds {count} experts, but config.json states {number}"
    for name, entry in each.items():
        is_down = EXPERT_PROJECTIONS.get(leaf_of(name)) == "down"
        expected = (hidden, inner) if is_down else (inner, hidden)
        if not _has_shape(entry, expected):
            yield _wrong_shape(f"{name}.weight", entry, expected)


def _stated_sizes(config: Mapping[str, Any]) -> tuple[int | None, int | None, int | None]:
    """Return the number of experts, the hidden size and the experts' inner size by config.json; None where unknown."""
    values = (next((config[key] for key in keys if isinstance(config.get(key), int)), None) for keys in _SIZES)
    number, hidden, inner = values
    return number, hidden, inner


def _has_shape(entry: TensorEntry, expected: Sequence[int | None]) -> bool:
    return len(entry.shape) == len(expected) and all(
        size is None or size == found for found, size in zip(entry.shape, expected, strict=True)
    )


def _wrong_shape(name: str, entry: TensorEntry, expected: Sequence[int | None]) -> str:
    sizes = ", ".join("?" if size is None else str(size) for size in expected)
    return f"{name}: expected [{sizes}] by config.json, found {list(entry.shape)}"


def _fused_problems(modules: Mapping[str, Any], fmt: MiLoFormat) -> Iterator[str]:
    """Matrices that vLLM fuses into one layer must have one group size."""
    for leaves in FUSED_LAYERS.values():
        for parent in sorted({name.rpartition(".")[0] for name in modules if leaf_of(name) == leaves[0]}):
            try:
                fmt.fused_group_size([part for leaf in leaves if (part := f"{parent}.{leaf}") in modules])
            except CheckpointError as error:
                yield str(error)


def _table_problems(modules: Mapping[str, Any], experts: Mapping[str, int], fmt: MiLoFormat) -> Iterator[str]:
    """Exact names in the tables must exist: a misspelt one would silently give rank 0, or the default's groups."""
    linear = {name for name in modules if split_expert_name(name) is None}
    for key, table in (("ranks", fmt.ranks), ("group_sizes", fmt.groups)):
        for names, known in ((table.modules, linear), (table.experts, experts.keys())):
            for name in names:
                if not name.startswith("re:") and name not in known:
                    yield f"{key}: {shown_name(name)} is in the table, but the files hold no such quantized matrix"
