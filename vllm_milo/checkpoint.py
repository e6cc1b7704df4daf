"""The MiLo checkpoint contract, format_version 1: names, dtypes, shapes, ranks and what is quantized.

Pure Python (no torch, no vLLM): the converter writes by it, the plugin loads by it and
:mod:`vllm_milo.validation` checks files against it. README.md describes the same format in prose.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from .names import EXPERT_PROJECTIONS

QUANT_METHOD = "milo"
FORMAT_VERSION = 1
BITS = 3
GROUP_SIZES = (32, 64, 128)
COMPENSATOR_BITS = (3, 8, 16)
COMPENSATOR_GROUP_SIZE = 64
SIZE_MULTIPLE = 64
"""N and K of every quantized matrix are multiples of this; anything else is refused, never padded."""

PACKED, SCALE, ZERO = "weight_packed", "weight_scale", "weight_zero"
U, V, U_SCALE, V_SCALE = "weight_u", "weight_v", "weight_u_scale", "weight_v_scale"
BASE_TENSORS = (PACKED, SCALE, ZERO)
FACTOR_TENSORS = (U, V, U_SCALE, V_SCALE)
TENSOR_NAMES = BASE_TENSORS + FACTOR_TENSORS

_EXPERT_MATRIX = re.compile(r"(?P<experts>.+\.experts)\.(?P<index>\d+)\.(?P<projection>[^.]+)")

TensorSpec = tuple[str, tuple[int, ...]]
"""A tensor's safetensors dtype name ("I32", "F16", …) and shape."""


class CheckpointError(ValueError):
    """A checkpoint, or its ``quantization_config``, breaks the format; the message names what and where."""


def packed_words(codes: int) -> int:
    """Return how many int32 words a row of ``codes`` 3-bit codes takes (32 codes are 3 words)."""
    return codes * BITS // 32


def split_expert_name(name: str) -> tuple[str, int, str] | None:
    """Split ``….experts.3.gate_proj`` into (``….experts``, 3, ``gate_proj``); None for any other module."""
    match = _EXPERT_MATRIX.fullmatch(name)
    return (match["experts"], int(match["index"]), match["projection"]) if match else None


@cache
def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise CheckpointError(f"quantization_config: 're:{pattern}' is not a regular expression: {error}") from None


def find_key(table: Iterable[str], name: str) -> str | None:
    """Return the key of ``table`` that holds for ``name``: the exact name, else the last matching ``re:``."""
    keys = list(table)
    if name in keys:
        return name
    patterns = [key for key in keys if key.startswith("re:") and _compile(key[3:]).fullmatch(name)]
    return patterns[-1] if patterns else None


def _require_projection(where: str, projection: str) -> None:
    if projection not in EXPERT_PROJECTIONS:
        raise CheckpointError(f"quantization_config.{where}: unknown projection; known are {list(EXPERT_PROJECTIONS)}")


def _require_rank(where: str, rank: object) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
        raise CheckpointError(f"quantization_config.{where} must be a rank >= 0, found {rank!r}")


@dataclass(frozen=True)
class CompensatorFormat:
    """How all low-rank factors are stored: ``bits`` 3, 8 or 16, scales per ``group_size`` along a row."""

    bits: int = 3
    group_size: int = COMPENSATOR_GROUP_SIZE

    def __post_init__(self) -> None:
        if self.bits not in COMPENSATOR_BITS:
            raise CheckpointError(
                f"quantization_config.compensator.bits is {self.bits!r}; supported are {COMPENSATOR_BITS}"
            )
        if self.group_size != COMPENSATOR_GROUP_SIZE:
            raise CheckpointError(
                f"quantization_config.compensator.group_size is {self.group_size!r}; "
                f"format_version {FORMAT_VERSION} has {COMPENSATOR_GROUP_SIZE}"
            )

    @property
    def quantized(self) -> bool:
        """Whether factors are integers with scales (bits 3 or 8)."""
        return self.bits != 16

    def row(self, columns: int, model_dtype: str) -> tuple[str, int]:
        """Return the dtype and the number of elements of one stored factor row of ``columns`` values."""
        if self.bits == 16:
            return model_dtype, columns
        return ("I8", columns) if self.bits == 8 else ("I32", packed_words(columns))

    def split_multiples(self, group_size: int, has_rank: bool) -> tuple[int, int]:
        """Return what N and K of one rank's part of a matrix must be multiples of, under tensor parallelism.

        K must cut no group, packed word or scale of V; N no scale of U.
        """
        quantized = has_rank and self.quantized
        return self.group_size if quantized else 1, max(group_size, self.group_size if quantized else 32)


@dataclass(frozen=True)
class RankTable:
    """The compensator rank of every quantized matrix.

    ``modules`` maps linear layers (exact names or ``re:`` patterns) to ranks; ``experts`` maps the name of
    a layer's experts to ranks by projection, one number for all experts or a list by expert index.
    """

    default: int = 0
    modules: Mapping[str, int] = field(default_factory=dict)
    experts: Mapping[str, Mapping[str, int | list[int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_rank("ranks.default", self.default)
        for name, rank in self.modules.items():
            _require_rank(f"ranks.modules[{name!r}]", rank)
        for name, projections in self.experts.items():
            for projection, ranks in projections.items():
                where = f"ranks.experts[{name!r}][{projection!r}]"
                _require_projection(where, projection)
                for rank in ranks if isinstance(ranks, list) else [ranks]:
                    _require_rank(where, rank)

    def of_module(self, name: str) -> int:
        """Return the rank of the linear layer ``name``."""
        key = find_key(self.modules, name)
        return self.default if key is None else self.modules[key]

    def of_experts(self, name: str, projection: str, num_experts: int) -> list[int]:
        """Return the ranks of one projection of all experts of the layer ``name``, by expert index.

        Raises:
            CheckpointError: the table lists another number of experts.
        """
        key = find_key(self.experts, name)
        ranks = self.default if key is None else self.experts[key].get(projection, self.default)
        if isinstance(ranks, int):
            return [ranks] * num_experts
        if len(ranks) != num_experts:
            raise CheckpointError(
                f"quantization_config.ranks.experts[{key!r}][{projection!r}] lists {len(ranks)} ranks, "
                f"but {name} has {num_experts} experts"
            )
        return list(ranks)


@dataclass(frozen=True)
class GroupTable:
    """The matrices whose group size is not that of the checkpoint.

    ``modules`` maps linear layers (exact names or ``re:`` patterns) to group sizes; ``experts`` maps the name of a
    layer's experts to group sizes by projection, which all of its experts share.
    """

    modules: Mapping[str, int] = field(default_factory=dict)
    experts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, size in self.modules.items():
            _require_group_size(f"group_sizes.modules[{name!r}]", size)
        for name, sizes in self.experts.items():
            where = f"group_sizes.experts[{name!r}]"
            if not isinstance(sizes, Mapping):
                raise CheckpointError(f"quantization_config.{where} must be an object by projection, found {sizes!r}")
            for projection, size in sizes.items():
                _require_projection(f"{where}[{projection!r}]", projection)
                _require_group_size(f"{where}[{projection!r}]", size)
            if len({EXPERT_PROJECTIONS[projection] for projection in sizes}) < len(sizes):
                raise CheckpointError(f"quantization_config.{where} names a projection twice: {sorted(sizes)}")

    def __bool__(self) -> bool:
        """Whether there is any such matrix."""
        return bool(self.modules or self.experts)

    def of_module(self, name: str, default: int) -> int:
        """Return the group size of the linear layer ``name``; ``default`` where the table does not name it."""
        key = find_key(self.modules, name)
        return default if key is None else self.modules[key]

    def of_experts(self, name: str, projection: str, default: int) -> int:
        """Return the group size of one projection of all experts of the layer ``name``; w1 and gate_proj are one."""
        key = find_key(self.experts, name)
        sizes = {} if key is None else self.experts[key]
        role = EXPERT_PROJECTIONS.get(projection)
        return next((size for own, size in sizes.items() if EXPERT_PROJECTIONS[own] == role), default)


def _require_group_size(where: str, size: object) -> None:
    if not isinstance(size, int) or size not in GROUP_SIZES:
        raise CheckpointError(f"quantization_config.{where} is {size!r}; supported are {GROUP_SIZES}")


@dataclass(frozen=True)
class MiLoFormat:
    """The ``quantization_config`` of a MiLo checkpoint, checked; see :meth:`from_dict`."""

    group_size: int = 64
    compensator: CompensatorFormat = CompensatorFormat()
    ranks: RankTable = RankTable()
    ignore: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    groups: GroupTable = GroupTable()

    def __post_init__(self) -> None:
        _require_group_size("group_size", self.group_size)
        for name in self.groups.experts:
            gate, up = (self.groups.of_experts(name, projection, self.group_size) for projection in ("w1", "w3"))
            if gate != up:
                raise CheckpointError(
                    f"quantization_config.group_sizes.experts[{name!r}] gives the gate projection groups of {gate} and "
                    f"the up projection groups of {up}; one GEMM computes both, in one group size"
                )
        for key in self.ignore:
            if key.startswith("re:"):
                _compile(key[3:])

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> MiLoFormat:
        """Read the ``quantization_config`` of a checkpoint's config.json.

        Raises:
            CheckpointError: a missing or unknown key, an unsupported value, or a newer format_version.
        """
        _check_header(config)
        compensator = _mapping(config, "compensator")
        ranks = _mapping(config, "ranks")
        _reject_unknown(compensator, {"bits", "group_size"}, "compensator.")
        _reject_unknown(ranks, {"default", "modules", "experts"}, "ranks.")
        groups = _mapping(config, "group_sizes")
        _reject_unknown(groups, {"modules", "experts"}, "group_sizes.")
        ignore = config.get("ignore", [])
        if not isinstance(ignore, list) or not all(isinstance(key, str) for key in ignore):
            raise CheckpointError(f"quantization_config.ignore must be a list of names, found {ignore!r}")
        return cls(
            group_size=config.get("group_size", 64),
            compensator=CompensatorFormat(
                compensator.get("bits", 3), compensator.get("group_size", COMPENSATOR_GROUP_SIZE)
            ),
            ranks=RankTable(ranks.get("default", 0), _mapping(ranks, "modules"), _mapping(ranks, "experts")),
            ignore=tuple(ignore),
            recipe=_mapping(config, "recipe"),
            groups=GroupTable(_mapping(groups, "modules"), _mapping(groups, "experts")),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that :meth:`from_dict` reads; without exceptions it has no ``group_sizes``."""
        exceptions = {
            "modules": dict(self.groups.modules),
            "experts": {name: dict(sizes) for name, sizes in self.groups.experts.items()},
        }
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "bits": BITS,
            "group_size": self.group_size,
            **({"group_sizes": exceptions} if self.groups else {}),
            "zero_point": "real",
            "compensator": {"bits": self.compensator.bits, "group_size": self.compensator.group_size},
            "ranks": {
                "default": self.ranks.default,
                "modules": dict(self.ranks.modules),
                "experts": {name: dict(table) for name, table in self.ranks.experts.items()},
            },
            "ignore": list(self.ignore),
            "recipe": dict(self.recipe),
        }

    def ignores(self, name: str) -> bool:
        """Return whether the linear layer ``name`` is stored unquantized."""
        return find_key(self.ignore, name) is not None

    def module_group_size(self, name: str) -> int:
        """Return the group size of a quantized matrix, a linear layer or an expert's, by its name in checkpoints."""
        expert = split_expert_name(name)
        if expert is None:
            return self.groups.of_module(name, self.group_size)
        layer, _, projection = expert
        return self.groups.of_experts(layer, projection, self.group_size)

    def fused_group_size(self, parts: Sequence[str]) -> int:
        """Return the group size of linear layers that vLLM fuses into one.

        Raises:
            CheckpointError: they differ; the message names them.
        """
        sizes = {part: self.module_group_size(part) for part in parts}
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{part} has {size}" for part, size in sizes.items())
            raise CheckpointError(f"group_sizes: vLLM fuses these layers, which need one group size: {listed}")
        return sizes[parts[0]]

    def base_tensors(self, n: int, k: int, group_size: int) -> dict[str, TensorSpec]:
        """Return dtype and shape of the codes, scales and zero points of an [n, k] matrix in groups of a size."""
        return {
            PACKED: ("I32", (n, packed_words(k))),
            SCALE: ("F16", (n, k // group_size)),
            ZERO: ("F16", (n, k // group_size)),
        }

    def factor_tensors(self, n: int, k: int, rank: int, model_dtype: str) -> dict[str, TensorSpec]:
        """Return dtype and shape of the rank-major factors of an [n, k] matrix; nothing where rank is 0."""
        if rank == 0:
            return {}
        specs: dict[str, TensorSpec] = {}
        for factor, scale, columns in ((U, U_SCALE, n), (V, V_SCALE, k)):
            dtype, elements = self.compensator.row(columns, model_dtype)
            specs[factor] = (dtype, (rank, elements))
            if self.compensator.quantized:
                specs[scale] = ("F16", (rank, columns // self.compensator.group_size))
        return specs

    def check_matrix(self, name: str, n: int, k: int, group_size: int) -> None:
        """Refuse an [n, k] matrix that the format cannot hold in groups of ``group_size``.

        Raises:
            CheckpointError: n or k is not a multiple of 64, or k not of the group size.
        """
        if n % SIZE_MULTIPLE or k % SIZE_MULTIPLE:
            raise CheckpointError(
                f"{name}: shape [{n}, {k}] is not a multiple of {SIZE_MULTIPLE} in both dimensions; "
                f"keep this layer unquantized (--ignore)"
            )
        if k % group_size:
            raise CheckpointError(
                f"{name}: input size {k} is not a multiple of group size {group_size}; convert the model again"
            )


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"quantization_config: {key} must be an object, found {value!r}")
    return value


def _reject_unknown(config: Mapping[str, Any], known: set[str], prefix: str = "") -> None:
    unknown = sorted(set(config) - known)
    if unknown:
        raise CheckpointError(f"quantization_config: unknown key {prefix}{unknown[0]}; known are {sorted(known)}")


def _check_header(config: Mapping[str, Any]) -> None:
    """Check the keys that say which format this is, the newest first: a newer one may change all others."""
    version = config.get("format_version")
    if version is None:
        raise CheckpointError(
            "quantization_config has no format_version; was this checkpoint written by `milo quantize`?"
        )
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"quantization_config.format_version is {version!r}; this version of vllm-milo reads "
            f"{FORMAT_VERSION}: upgrade vllm-milo, or convert the model again"
        )
    _reject_unknown(
        config,
        {"quant_method", "format_version", "bits", "group_size", "zero_point", "compensator", "ranks"}
        | {"group_sizes", "ignore", "recipe"},
    )
    for key, only in (("quant_method", QUANT_METHOD), ("bits", BITS), ("zero_point", "real")):
        if config.get(key, only) != only:
            raise CheckpointError(
                f"quantization_config.{key} is {config[key]!r}; format_version {FORMAT_VERSION} has {only!r}"
            )
