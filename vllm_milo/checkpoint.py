"""The MiLo checkpoint contract, format_version 1: names, dtypes, shapes, ranks and what is quantized.

Pure Python (no torch, no vLLM): the converter writes by it, the plugin loads by it and
:mod:`vllm_milo.validation` checks files against it. README.md describes the same format in prose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from .head.layout import PLAIN_BITS, require_head_bits
from .names import EXPERT_PROJECTIONS, Keys, Names, split_expert_name
from .values import CheckpointError, object_of, require_object, shown, shown_name

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

LARGEST_RANK = 2**20
"""Above that of any matrix."""

TensorSpec = tuple[str, tuple[int, ...]]
"""A tensor's safetensors dtype name ("I32", "F16", …) and shape."""


def packed_words(codes: int) -> int:
    """Return how many int32 words a row of ``codes`` 3-bit codes takes (32 codes are 3 words)."""
    return codes * BITS // 32


def _require_projection(where: str, projection: str) -> None:
    if projection not in EXPERT_PROJECTIONS:
        raise CheckpointError(f"quantization_config.{where}: unknown projection; known are {list(EXPERT_PROJECTIONS)}")


def _require_rank(where: str, rank: object) -> None:
    if type(rank) is not int or not 0 <= rank <= LARGEST_RANK:
        raise CheckpointError(f"quantization_config.{where} must be a rank >= 0, found {shown(rank)}")


@dataclass(frozen=True)
class CompensatorFormat:
    """How all low-rank factors are stored: ``bits`` 3, 8 or 16, scales per ``group_size`` along a row."""

    bits: int = 3
    group_size: int = COMPENSATOR_GROUP_SIZE

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in COMPENSATOR_BITS:
            raise CheckpointError(
                f"quantization_config.compensator.bits is {shown(self.bits)}; supported are {COMPENSATOR_BITS}"
            )
        if type(self.group_size) is not int or self.group_size != COMPENSATOR_GROUP_SIZE:
            raise CheckpointError(
                f"quantization_config.compensator.group_size is {shown(self.group_size)}; "
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


class _Table:
    """A table by names of linear layers and of layers' experts."""

    modules: Mapping[str, Any]
    experts: Mapping[str, Any]
    called: Names | None

    @cached_property
    def _module_keys(self) -> Keys:
        return Keys(self.modules, self.called)

    @cached_property
    def _expert_keys(self) -> Keys:
        return Keys(self.experts, self.called)


@dataclass(frozen=True)
class RankTable(_Table):
    """The compensator rank of every quantized matrix.

    ``modules`` maps linear layers (exact names or ``re:`` patterns) to ranks; ``experts`` maps the name of
    a layer's experts to ranks by projection, one number for all experts or a list by expert index. ``called`` returns
    all names of a module, for patterns, where it has several.
    """

    default: int = 0
    modules: Mapping[str, int] = field(default_factory=dict)
    experts: Mapping[str, Mapping[str, int | list[int]]] = field(default_factory=dict)
    called: Names | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        _require_rank("ranks.default", self.default)
        for name, rank in self.modules.items():
            _require_rank(f"ranks.modules[{shown(name)}]", rank)
        for name, projections in self.experts.items():
            where = f"ranks.experts[{shown(name)}]"
            require_object(f".{where}", projections, " by projection")
            for projection, ranks in projections.items():
                _require_projection(f"{where}[{shown(projection)}]", projection)
                for rank in ranks if isinstance(ranks, list) else [ranks]:
                    _require_rank(f"{where}[{shown(projection)}]", rank)
        _ = self._module_keys, self._expert_keys  # patterns that are none are found here

    def of_module(self, name: str) -> int:
        """Return the rank of the linear layer ``name``."""
        key = self._module_keys.find(name)
        return self.default if key is None else self.modules[key]

    def of_experts(self, name: str, projection: str, num_experts: int) -> list[int]:
        """Return the ranks of one projection of all experts of the layer ``name``, by expert index.

        Raises:
            CheckpointError: the table lists another number of experts.
        """
        ranks = self._of_projection(name, projection, num_experts)
        return [ranks] * num_experts if isinstance(ranks, int) else list(ranks)

    def of_expert(self, name: str, projection: str, index: int, num_experts: int) -> int:
        """Return the rank of one projection of one expert; see :meth:`of_experts`."""
        ranks = self._of_projection(name, projection, num_experts)
        return ranks if isinstance(ranks, int) else ranks[index]

    def projections_of(self, name: str) -> list[str]:
        """Return the projections that the table names of the experts of the layer ``name``."""
        key = self._expert_keys.find(name)
        return [] if key is None else list(self.experts[key])

    def _of_projection(self, name: str, projection: str, num_experts: int) -> int | list[int]:
        key = self._expert_keys.find(name)
        ranks = self.default if key is None else self.experts[key].get(projection, self.default)
        if isinstance(ranks, list) and len(ranks) != num_experts:
            raise CheckpointError(
                f"quantization_config.ranks.experts[{key!r}][{projection!r}] lists {len(ranks)} ranks, "
                f"but {name} has {num_experts} experts"
            )
        return ranks


@dataclass(frozen=True)
class GroupTable(_Table):
    """The matrices whose group size is not that of the checkpoint.

    ``modules`` maps linear layers (exact names or ``re:`` patterns) to group sizes; ``experts`` maps the name of a
    layer's experts to group sizes by projection, which all of its experts share. ``called`` is a rank table's.
    """

    modules: Mapping[str, int] = field(default_factory=dict)
    experts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    called: Names | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name, size in self.modules.items():
            _require_group_size(f"group_sizes.modules[{shown(name)}]", size)
        for name, sizes in self.experts.items():
            where = f"group_sizes.experts[{shown(name)}]"
            require_object(f".{where}", sizes, " by projection")
            for projection, size in sizes.items():
                _require_projection(f"{where}[{shown(projection)}]", projection)
                _require_group_size(f"{where}[{shown(projection)}]", size)
            if len({EXPERT_PROJECTIONS[projection] for projection in sizes}) < len(sizes):
                raise CheckpointError(f"quantization_config.{where} names a projection twice: {sorted(sizes)}")
        _ = self._module_keys, self._expert_keys  # patterns that are none are found here

    def __bool__(self) -> bool:
        """Whether there is any such matrix."""
        return bool(self.modules or self.experts)

    def of_module(self, name: str, default: int) -> int:
        """Return the group size of the linear layer ``name``; ``default`` where the table does not name it."""
        key = self._module_keys.find(name)
        return default if key is None else self.modules[key]

    def of_experts(self, name: str, projection: str, default: int) -> int:
        """Return the group size of one projection of all experts of the layer ``name``; w1 and gate_proj are one."""
        key = self._expert_keys.find(name)
        sizes = {} if key is None else self.experts[key]
        role = EXPERT_PROJECTIONS.get(projection)
        return next((size for own, size in sizes.items() if EXPERT_PROJECTIONS[own] == role), default)


def _require_group_size(where: str, size: object) -> None:
    if type(size) is not int or size not in GROUP_SIZES:
        raise CheckpointError(f"quantization_config.{where} is {shown(size)}; supported are {GROUP_SIZES}")


@dataclass(frozen=True)
class MiLoFormat:
    """The ``quantization_config`` of a MiLo checkpoint, checked; ``called`` is a table's. See :meth:`from_dict`."""

    group_size: int = 64
    compensator: CompensatorFormat = CompensatorFormat()
    ranks: RankTable = RankTable()
    ignore: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    groups: GroupTable = GroupTable()
    called: Names | None = field(default=None, compare=False)
    lm_head_bits: int = PLAIN_BITS

    def __post_init__(self) -> None:
        _require_group_size("group_size", self.group_size)
        require_head_bits(self.lm_head_bits)
        for name, sizes in self.groups.experts.items():
            if all(EXPERT_PROJECTIONS[projection] != "gate" for projection in sizes):
                continue  # experts without one; of others the tensors say it
            where = f"group_sizes.experts[{shown(name)}]"
            gate, up = (self.groups.of_experts(name, projection, self.group_size) for projection in ("w1", "w3"))
            if gate != up:
                raise CheckpointError(
                    f"quantization_config.{where} gives the gate projection groups of {gate} and the up projection "
                    f"groups of {up}; one GEMM computes both, in one group size"
                )
        _ = self._ignored  # patterns that are none are found here

    @cached_property
    def _ignored(self) -> Keys:
        return Keys(self.ignore, self.called)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> MiLoFormat:
        """Read the ``quantization_config`` of a checkpoint's config.json.

        Raises:
            CheckpointError: a missing or unknown key, an unsupported value, or a newer format_version.
        """
        _check_header(config)
        compensator = object_of(config, "compensator")
        ranks = object_of(config, "ranks")
        _reject_unknown(compensator, {"bits", "group_size"}, "compensator.")
        _reject_unknown(ranks, {"default", "modules", "experts"}, "ranks.")
        groups = object_of(config, "group_sizes")
        _reject_unknown(groups, {"modules", "experts"}, "group_sizes.")
        ignore = config.get("ignore", [])
        if not isinstance(ignore, list) or not all(isinstance(key, str) for key in ignore):
            raise CheckpointError(f"quantization_config.ignore must be a list of names, found {shown(ignore)}")
        return cls(
            group_size=config.get("group_size", 64),
            compensator=CompensatorFormat(
                compensator.get("bits", 3), compensator.get("group_size", COMPENSATOR_GROUP_SIZE)
            ),
            ranks=RankTable(ranks.get("default", 0), object_of(ranks, "modules"), object_of(ranks, "experts")),
            ignore=tuple(ignore),
            recipe=object_of(config, "recipe"),
            groups=GroupTable(object_of(groups, "modules"), object_of(groups, "experts")),
            lm_head_bits=config.get("lm_head_bits", PLAIN_BITS),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that :meth:`from_dict` reads; ``group_sizes``, ``lm_head_bits`` where they matter."""
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
            **({} if self.lm_head_bits == PLAIN_BITS else {"lm_head_bits": self.lm_head_bits}),
            "recipe": dict(self.recipe),
        }

    def ignores(self, name: str) -> bool:
        """Return whether a linear layer, or all routed experts of the module ``name``, are stored unquantized."""
        return self._ignored.find(name) is not None

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
        if n % SIZE_MULTIPLE or k % SIZE_MULTIPLE or not n or not k:
            raise CheckpointError(
                f"{name}: shape [{n}, {k}] is not a multiple of {SIZE_MULTIPLE} in both dimensions; "
                f"keep this layer unquantized (--ignore)"
            )
        if k % group_size:
            raise CheckpointError(
                f"{name}: input size {k} is not a multiple of group size {group_size}; convert the model again"
            )


def _reject_unknown(config: Mapping[str, Any], known: set[str], prefix: str = "") -> None:
    unknown = sorted(set(config) - known)
    if unknown:
        raise CheckpointError(
            f"quantization_config: unknown key {prefix}{shown_name(unknown[0])}; known are {sorted(known)}"
        )


def _check_header(config: Mapping[str, Any]) -> None:
    """Check the keys that say which format this is, the newest first: a newer one may change all others."""
    version = config.get("format_version")
    if version is None:
        raise CheckpointError(
            "quantization_config has no format_version; was this checkpoint written by `milo quantize`?"
        )
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"quantization_config.format_version is {shown(version)}; this version of vllm-milo reads "
            f"{FORMAT_VERSION}: upgrade vllm-milo, or convert the model again"
        )
    _reject_unknown(
        config,
        {"quant_method", "format_version", "bits", "group_size", "zero_point", "compensator", "ranks"}
        | {"group_sizes", "ignore", "lm_head_bits", "recipe"},
    )
    for key, only in (("quant_method", QUANT_METHOD), ("bits", BITS), ("zero_point", "real")):
        if config.get(key, only) != only:
            raise CheckpointError(
                f"quantization_config.{key} is {shown(config[key])}; format_version {FORMAT_VERSION} has {only!r}"
            )
