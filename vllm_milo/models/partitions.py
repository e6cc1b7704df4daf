"""How the matrices of a linear layer lie in the partitions of its outputs, and how ranks cut them.

vLLM fuses matrices that read the same input: q, k and v are three partitions of one layer. A checkpoint's tensor is
mostly one partition, but in some families it covers several, which tensor parallelism cuts each by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch

from vllm_milo.models.parameters import FactorSlice
from vllm_milo.names import QKV_PARTS, leaf_of
from vllm_milo.values import CheckpointError

_QKV = tuple(part[0] for part in QKV_PARTS)
"""vLLM's shard ids of attention's partitions: q, k, v."""
_SPANS = {"in_proj_qkvz": (3, 1)}
"""How many partitions each tensor covers, by vLLM's name of a layer with fewer tensors than partitions but several."""


def spans_of(prefix: str, parts: Sequence[str], partitions: int) -> list[range]:
    """Return which partitions of a layer each matrix of the checkpoint covers, in order.

    Args:
        prefix: vLLM's name of the layer.
        parts: checkpoint names of its matrices.
        partitions: the number of the layer's partitions.

    Raises:
        CheckpointError: the numbers tell nothing.
    """
    counts: Sequence[int] = _SPANS.get(leaf_of(prefix), ())
    if len(parts) == partitions:
        counts = [1] * partitions
    elif len(parts) == 1:
        counts = [partitions]
    if len(counts) != len(parts) or sum(counts) != partitions:
        raise CheckpointError(
            f"{prefix}: vLLM fuses {partitions} matrices here, MiLo knows {list(parts)}; "
            f"{keep_unquantized(prefix, parts)}"
        )
    ends = list(accumulate(counts))
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def keep_unquantized(prefix: str, parts: Sequence[str]) -> str:
    """Return what to do about a layer whose matrices cannot be told apart, for a message."""
    leaves = sorted({re.escape(leaf_of(name)) for name in (*parts, prefix)})
    return rf"convert the model with --ignore 're:.*\.({'|'.join(leaves)})'"


class Split:
    """How a layer's partitions are cut over tensor-parallel ranks.

    Args:
        layer: vLLM's.
        k: inputs of one rank.
        widths: outputs of one rank by partition.
        input_size: inputs of all ranks.
        output_size: outputs of all ranks; replicated ones count for each.
    """

    def __init__(
        self, layer: torch.nn.Module, k: int, widths: Sequence[int], input_size: int, output_size: int
    ) -> None:
        self.k = k
        self.widths = list(widths)
        self.column_tp = output_size // sum(widths)
        self.row_tp = input_size // k
        # K and V heads fewer than ranks are replicated: rank r holds slice r // replicas
        self.replicas: int | None = getattr(layer, "num_kv_head_replicas", None)
        self._key_heads: int | None = getattr(layer, "total_num_kv_heads", None)

    @property
    def only(self) -> bool:
        """Whether the layer has one partition; vLLM gives it no shard id."""
        return len(self.widths) == 1

    def span(self, shard_id: Any) -> range:
        """Return the partitions that a tensor covers by vLLM's shard id: None means all, a tuple some."""
        if shard_id is None:
            return range(len(self.widths))
        ids = shard_id if isinstance(shard_id, tuple) else (shard_id,)
        first, last = (_QKV.index(one) if one in _QKV else int(one) for one in (ids[0], ids[-1]))
        return range(first, last + 1)

    def shard_id(self, partition: int) -> Any:
        """Return vLLM's shard id of one partition."""
        return partition if self.replicas is None else _QKV[partition]

    def full_width(self, span: range) -> int:
        """Return the unsharded output size of some partitions."""
        return sum(self._full_width(partition) for partition in span)

    def most_parts(self, partition: int) -> int | None:
        """Return over how many parts a partition can be cut at most; None for no limit."""
        return self._key_heads if partition > 0 else None

    def rows(self, span: range) -> Iterator[tuple[int, slice]]:
        """Yield each partition of a tensor with its rows there, unsharded."""
        start = 0
        for partition in span:
            stop = start + self._full_width(partition)
            yield partition, slice(start, stop)
            start = stop

    def output_slices(self, span: range, tp_rank: int) -> list[FactorSlice]:
        """Return which outputs of a tensor a rank holds, a slice of each partition."""
        slices = []
        for partition, rows in self.rows(span):
            index = tp_rank // self._replicas(partition) if self.column_tp > 1 else 0
            width = self.widths[partition]
            slices.append(FactorSlice(rows.start + index * width, width))
        return slices

    def input_slice(self, tp_rank: int) -> FactorSlice:
        """Return which inputs a rank holds."""
        return FactorSlice(tp_rank * self.k if self.row_tp > 1 else 0, self.k)

    def _full_width(self, partition: int) -> int:
        return self.widths[partition] * self.column_tp // self._replicas(partition)

    def _replicas(self, partition: int) -> int:
        return (self.replicas or 1) if partition > 0 else 1
