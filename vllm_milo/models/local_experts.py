"""What of a layer's routed experts this process holds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vllm_milo.kernels.weights import offsets


@dataclass(frozen=True)
class Gemm:
    """One of the layer's two grouped GEMMs, in this process.

    ``ranks[e][p]`` is the compensator rank of part p of local expert e; ``n`` counts all parts, which ``shards`` names.
    """

    name: str
    n: int
    k: int
    group_size: int
    ranks: list[list[int]]
    shards: tuple[str, ...]

    @property
    def parts(self) -> int:
        """Return how many matrices of an expert it computes."""
        return len(self.shards)

    @cached_property
    def rank_offsets(self) -> list[int]:
        """Where the factors of each part of each expert begin; asked for by every factor tensor of a load."""
        return offsets([rank for expert in self.ranks for rank in expert])


class LocalExperts:
    """Which global experts this process holds, by local index."""

    def __init__(self, layer: Any) -> None:
        number = layer.global_num_experts
        local = {expert: layer._map_global_expert_id_to_local_expert_id(expert) for expert in range(number)}
        self._index = {expert: int(index) for expert, index in local.items() if index >= 0}
        self.global_ids = sorted(self._index, key=lambda expert: self._index[expert])

    def index(self, expert: int) -> int | None:
        """Return the local index of a global expert; None if another process holds it."""
        return self._index.get(expert)
