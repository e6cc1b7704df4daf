"""Which tensors and which entries of the tables of ranks and group sizes a quantized matrix becomes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch

from vllm_milo.checkpoint import PACKED, SCALE, U_SCALE, V_SCALE, ZERO, GroupTable, RankTable, U, V
from vllm_milo.kernels.packing import pack_codes, unpack_codes
from vllm_milo.names import split_expert_name

from ..nouns import Matrix, Recipe
from ..solve.base.group import GroupQuantized
from ..solve.compensator.factors import StoredFactor
from ..solve.compensator.low_rank import StoredPair
from ..solve.methods import Solved

Value = TypeVar("Value")
TOGETHER = 2**27
"""Weights whose codes are packed and moved at once, about."""


def rank_table(matrices: Sequence[Matrix], ranks: Mapping[str, int]) -> RankTable:
    """Return the checkpoint's rank table: exact names, and one number where all experts agree."""
    modules = {m.name: ranks[m.name] for m in matrices if m.experts is None and ranks[m.name]}
    by_projection: dict[str, dict[str, dict[int, int]]] = defaultdict(lambda: defaultdict(dict))
    for matrix in matrices:
        if matrix.experts is not None and matrix.expert is not None:
            projection = matrix.name.rpartition(".")[2]
            by_projection[matrix.experts][projection][matrix.expert] = ranks[matrix.name]
    experts: dict[str, dict[str, int | list[int]]] = {}
    for name, projections in by_projection.items():
        table: dict[str, int | list[int]] = {}
        for projection, by_expert in projections.items():
            values = [by_expert[index] for index in sorted(by_expert)]
            table[projection] = values[0] if len(set(values)) == 1 else values
        if any(table.values()):
            experts[name] = table
    return RankTable(0, modules, experts)


def group_table(matrices: Sequence[Matrix], recipe: Recipe) -> tuple[int, GroupTable]:
    """Return the checkpoint's group size, and the matrices that have another one.

    The first is the recipe's, unless it divides the inputs of no matrix.
    """
    sizes = {matrix.name: recipe.group_size_for(matrix.k) for matrix in matrices}
    default = recipe.group_size if recipe.group_size in sizes.values() else max(sizes.values())
    return default, exceptions(sizes, default)


def exceptions(sizes: Mapping[str, int], default: int) -> GroupTable:
    """Return the table of matrices whose group size is not ``default``.

    Args:
        sizes: of all matrices by name, the same for one projection of all experts of a layer.
        default: the checkpoint's.
    """
    modules: dict[str, int] = {}
    experts: dict[str, dict[str, int]] = defaultdict(dict)
    for name, size in sizes.items():
        expert = split_expert_name(name)
        if expert is None:
            modules[name] = size
        else:
            experts[expert[0]] |= {} if size == default else {expert[2]: size}
    return GroupTable(_without(modules, default), _without(experts, {}))


def _without(values: Mapping[str, Value], usual: Value) -> dict[str, Value]:
    """Return what is not ``usual``, under one pattern where it is the same in all decoder layers that have it."""
    alike: dict[str, dict[str, Value]] = defaultdict(dict)
    for name, value in values.items():
        inside = re.fullmatch(r".*\.layers\.\d+\.(.+)", name)
        alike[rf"re:.*\.layers\.\d+\.{re.escape(inside[1])}" if inside else name][name] = value
    table: dict[str, Value] = {}
    for pattern, same in alike.items():
        unusual = {name: value for name, value in same.items() if value != usual}
        first = next(iter(same.values()))
        as_one = len(unusual) > 1 and all(value == first for value in same.values())
        table |= {pattern: first} if as_one else unusual
    return table


class Stored(NamedTuple):
    """A quantized matrix as the checkpoint's tensors by name, on the CPU: a fraction of the bytes of its codes."""

    name: str
    rank: int
    tensors: Mapping[str, torch.Tensor]

    def to(self, device: torch.device) -> Solved:
        """Return the matrix on a device, to the bit as it was."""
        return read_matrix(self.name, self.tensors, device)


Result = Solved | Stored
"""A quantized matrix, where it was solved or on its way to the disk."""


def store_matrices(solved: Sequence[tuple[Matrix, Solved]]) -> list[tuple[Matrix, Stored]]:
    """Return matrices as they are stored."""
    tensors = tensors_on_host(solved)
    own = [(matrix, one, [name for name, *_ in _parts(matrix.name, one)]) for matrix, one in solved]
    return [
        (matrix, Stored(matrix.name, one.rank, {name: tensors[name] for name in names})) for matrix, one, names in own
    ]


def tensors_on_host(solved: Iterable[tuple[Matrix, Result]]) -> dict[str, torch.Tensor]:
    """Return the checkpoint's tensors of quantized matrices by name, on the CPU, each with its memory for itself.

    Those of one shape are packed and moved together: a layer of many experts has thousands.
    """
    found: dict[str, torch.Tensor] = {}
    held: list[tuple[Matrix, Solved]] = []
    weights = 0
    for matrix, one in solved:
        if isinstance(one, Stored):
            found |= _moved_together(held) | dict(one.tensors)
            held, weights = [], 0
            continue
        held.append((matrix, one))
        weights += matrix.n * matrix.k
        if weights >= TOGETHER:
            found |= _moved_together(held)
            held, weights = [], 0
    return found | _moved_together(held)


def _moved_together(solved: Sequence[tuple[Matrix, Solved]]) -> dict[str, torch.Tensor]:
    parts = [part for matrix, one in solved for part in _parts(matrix.name, one)]
    alike: dict[tuple[torch.Size, torch.dtype, torch.device, bool], list[tuple[str, torch.Tensor]]] = defaultdict(list)
    for name, tensor, packed in parts:
        alike[tensor.shape, tensor.dtype, tensor.device, packed].append((name, tensor))
    found: dict[str, torch.Tensor] = {}
    for (*_, packed), members in alike.items():
        together = torch.stack([tensor for _, tensor in members])
        moved = (pack_codes(together) if packed else together).cpu()
        # a view would keep all of them in memory until the last is written
        found |= {name: part.clone() for (name, _), part in zip(members, moved, strict=True)}
    return {name: found[name] for name, _, _ in parts}


def _parts(name: str, solved: Solved) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Yield names in the checkpoint, tensors, and whether these are codes that are still to be packed."""
    yield f"{name}.{PACKED}", solved.base.codes, True
    yield f"{name}.{SCALE}", solved.base.scale, False
    yield f"{name}.{ZERO}", solved.base.zero, False
    if solved.pair is None:
        return
    for factor, tensor, scale in ((solved.pair.u, U, U_SCALE), (solved.pair.v, V, V_SCALE)):
        yield f"{name}.{tensor}", factor.values, factor.values.dtype == torch.uint8
        if factor.scale is not None:
            yield f"{name}.{scale}", factor.scale, False


def read_matrix(name: str, tensors: Mapping[str, torch.Tensor], device: torch.device) -> Solved:
    """Return a quantized matrix on ``device``, to the bit as :func:`tensors_on_host` took it."""
    codes, scale, zero = (tensors[f"{name}.{leaf}"].to(device) for leaf in (PACKED, SCALE, ZERO))
    base = GroupQuantized(unpack_codes(codes), scale, zero)
    if f"{name}.{U}" not in tensors:
        return Solved(base, None)
    return Solved(base, StoredPair(*(_read_factor(name, *leaves, tensors, device) for leaves in _FACTORS)))


_FACTORS = ((U, U_SCALE), (V, V_SCALE))


def _read_factor(
    name: str, leaf: str, scale_leaf: str, tensors: Mapping[str, torch.Tensor], device: torch.device
) -> StoredFactor:
    values, scale = tensors[f"{name}.{leaf}"].to(device), tensors.get(f"{name}.{scale_leaf}")
    values = unpack_codes(values) if values.dtype == torch.int32 else values
    return StoredFactor(values, None if scale is None else scale.to(device))
