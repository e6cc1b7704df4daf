"""What one decoded token reads of a model's quantized matrices, alone in its batch, and what it waits for.

A token reads attention, shared experts and dense FFNs as a whole, of a layer's routed experts those that it goes to.
Bytes are those of the kernels' layout (:mod:`vllm_milo.kernels.resident`): padded ranks, codes of U in four bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from vllm_milo.kernels.resident import WIDE_BYTES, resident_bytes
from vllm_milo.names import EXPERT_PROJECTIONS, FUSED_LAYERS, leaf_of

from ..nouns import Matrix, Recipe
from .costs import Costs, LayerCosts, shipped_costs

_LAYER_OF = {part: layer for layer in ("qkv_proj", "gate_up_proj", "fused_qkv_a_proj") for part in FUSED_LAYERS[layer]}
"""Which fused layer of vLLM's a matrix is a part of, by its last name."""


class Held(NamedTuple):
    """A matrix as it is stored.

    Attributes:
        matrix: which one.
        rank: of its compensator.
        group_size: weights that share a scale and a zero point.
        factor_bits: 3, 8 or 16.
    """

    matrix: Matrix
    rank: int
    group_size: int
    factor_bits: int

    @property
    def code_bytes(self) -> int:
        """Return the bytes of codes, scales and zero points as the kernels hold them."""
        return resident_bytes(self.matrix.n, self.matrix.k, 0, self.group_size, self.factor_bits)

    @property
    def factor_bytes(self) -> int:
        """Return the bytes of the compensator as the kernels hold it."""
        whole = resident_bytes(self.matrix.n, self.matrix.k, self.rank, self.group_size, self.factor_bits)
        return whole - self.code_bytes


class Load(NamedTuple):
    """What one decoded token takes, alone in its batch.

    Attributes:
        code_bytes: of codes, scales and zero points that it reads.
        factor_bytes: of compensators that it reads, as the kernels hold them.
        launches: of V·x, one for each GEMM with a compensator.
        code_cost: of reading the codes, in bytes-equivalents (:mod:`.costs`).
        factor_cost: of reading the factors, likewise.
        layer_cost: of the layers' launches without compensators, likewise.
        launch_cost: of the launches of V·x, likewise.
    """

    code_bytes: float
    factor_bytes: float
    launches: int
    code_cost: float
    factor_cost: float
    layer_cost: float
    launch_cost: float

    @property
    def serving_share(self) -> float:
        """Return what reading factors costs over what reading codes does: what presets bound."""
        return self.factor_cost / self.code_cost

    @property
    def time_share(self) -> float:
        """Return the predicted time of compensators over that of the quantized layers without them."""
        return (self.factor_cost + self.launch_cost) / (self.code_cost + self.layer_cost)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "code_bytes": round(self.code_bytes),
            "factor_bytes": round(self.factor_bytes),
            "launches": self.launches,
            "serving_share": self.serving_share,
            "time_share": self.time_share,
        }


def serving_line(said: Mapping[str, Any], about: str = "") -> str:
    """Return what :meth:`Load.to_dict` holds as a line for people, with ``about`` before bytes of a forecast."""
    read = said["code_bytes"] + said["factor_bytes"]
    return (
        f"a token alone reads {about}{read / 2**20:.1f} MiB, {said['factor_bytes'] / read:.1%} of it compensators: "
        f"serving share {said['serving_share']:.3f}, predicted time {said['time_share']:+.0%}"
    )


def read_shares(matrices: Iterable[Matrix], top_k: int) -> dict[str, float]:
    """Return which share of the tokens reads each matrix, by name, where a token goes to ``top_k`` experts of a layer.

    Args:
        matrices: of one or more layers, with all routed experts of each that are quantized.
        top_k: experts of a token.
    """
    found = list(matrices)
    counts = Counter((m.experts, leaf_of(m.name)) for m in found if m.experts is not None)
    return {m.name: min(1.0, top_k / counts[m.experts, leaf_of(m.name)]) if m.experts else 1.0 for m in found}


def costs_of(matrix: Matrix, costs: Costs) -> LayerCosts:
    """Return what holds for a matrix of a table of costs."""
    return costs.dense if matrix.experts is None else costs.experts


def held_by(matrices: Iterable[Matrix], ranks: Mapping[str, int], recipe: Recipe) -> list[Held]:
    """Return matrices as a recipe stores them, with their ranks by name."""
    return [Held(m, ranks[m.name], recipe.group_size_for(m.k), recipe.factor_bits) for m in matrices]


def resident_bits(held: Iterable[Held], dense_wide: bool = False) -> float:
    """Return the average bits of a weight as the kernels hold it on one GPU, everything counted.

    Args:
        held: the matrices.
        dense_wide: whether those that are no routed expert's are in 16 bits and 8.
    """
    size, weights = 0.0, 0
    for one in held:
        here = one.matrix.n * one.matrix.k
        weights += here
        size += WIDE_BYTES * here if dense_wide and one.matrix.experts is None else one.code_bytes + one.factor_bytes
    return 8 * size / weights


def serving_load(held: Sequence[Held], top_k: int, costs: Costs | None = None) -> Load:
    """Return what one decoded token takes of a model's quantized matrices.

    Args:
        held: all of them, or those of some layers.
        top_k: experts of a token.
        costs: of bytes and launches; those of the shipped table without.
    """
    costs = shipped_costs() if costs is None else costs
    shares = read_shares((one.matrix for one in held), top_k)
    code_bytes = factor_bytes = code_cost = factor_cost = 0.0
    layers: dict[str, LayerCosts] = {}
    launches: dict[str, LayerCosts] = {}
    for one in held:
        of, share = costs_of(one.matrix, costs), shares[one.matrix.name]
        code_bytes += share * one.code_bytes
        factor_bytes += share * one.factor_bytes
        code_cost += share * one.code_bytes * of.code_byte
        factor_cost += share * one.factor_bytes * of.factor_byte
        layers[_served_layer(one.matrix)] = of
        if one.rank:
            launches[_gemm(one.matrix)] = of
    return Load(
        code_bytes,
        factor_bytes,
        len(launches),
        code_cost,
        factor_cost,
        sum(of.layer for of in layers.values()),
        sum(of.launch for of in launches.values()),
    )


def _served_layer(matrix: Matrix) -> str:
    """Return the layer of vLLM's that a matrix is served in: all routed experts of a layer are one."""
    return matrix.experts or _gemm(matrix)


def _gemm(matrix: Matrix) -> str:
    """Return the GEMM that a matrix is a part of: gate and up are read by one, down by another."""
    if matrix.experts is not None:
        return f"{matrix.experts}.{'down' if EXPERT_PROJECTIONS.get(leaf_of(matrix.name)) == 'down' else 'gate_up'}"
    block, _, leaf = matrix.name.rpartition(".")
    return f"{block}.{_LAYER_OF.get(leaf, leaf)}"
