"""Which tile a GEMM runs with."""

from __future__ import annotations

from typing import NamedTuple


def rank_step(max_rank: int, parts: int) -> int:
    """Return the ranks that the up-projection takes at a time, for the largest rank of an expert over all parts."""
    return 64 if max_rank >= 64 * parts else 16


class GemmConfig(NamedTuple):
    """A tile and how it is run.

    Attributes:
        block_m: tokens of a tile.
        block_n: outputs of a tile.
        split_k: parts of K that are computed apart and added by the consumer.
        scaled: scale the weights in registers (many tokens) instead of the products (few tokens).
        num_warps: warps of a tile.
        num_stages: depth of the load pipeline.
        group_blocks: neighbouring token blocks that go through the outputs together.
        tail_m: size of the smaller tile for an expert's last pairs; 0 for none.
        max_registers: cap on a thread's registers, so that more tiles fit; None for no cap.
    """

    block_m: int
    block_n: int
    split_k: int
    scaled: bool
    num_warps: int
    num_stages: int
    group_blocks: int = 1
    tail_m: int = 0
    max_registers: int | None = None

    def scales_weights(self, group_size: int) -> bool:
        """Whether whole tiles scale weights; groups of 32 never do."""
        return self.scaled and group_size != 32

    def needs_sums(self, group_size: int) -> bool:
        """Whether the GEMM reads the sums of its input: scaled weights hold the zero points already."""
        return not self.scales_weights(group_size)
