"""Which tile a GEMM runs with."""

from __future__ import annotations

from typing import NamedTuple


def rank_step(max_rank: int, parts: int) -> int:
    """Return the ranks that the up-projection takes at a time, for the largest rank of an expert over all parts."""
    return 64 if max_rank >= 64 * parts else 16


WARPGROUP_TOKENS = 16
"""Fewest tokens of a tile that a warpgroup multiplies, see :mod:`.dequant`; fewer are multiplied by warps."""
SCALES_PRODUCTS = 32
"""Most tokens of a tile for which it costs less to scale products than weights in fp32."""
MAX_SPLIT = 16
"""Most parts of K."""
THREE_TILES, FOUR_TILES, FIVE_TILES, SIX_TILES = 168, 128, 96, 80
"""Registers of a thread with which three to six tiles of four warps fit on a multiprocessor."""


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
        joined: an expert's last pairs run in one tile with the block before them, where the tile scales weights: these
            are dequantized once for both.
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
    joined: bool = False

    @property
    def register_cap(self) -> int | None:
        """The cap that a launch asks for: tiles of 16 tokens that name none must fit three times all the same."""
        if self.max_registers is None and (self.block_m, self.block_n, self.num_warps) == (16, 128, 4):
            return THREE_TILES
        return self.max_registers

    @property
    def by_products(self) -> GemmConfig:
        """The tile where weights cannot be scaled in fp16: one of few tokens scales products then, which costs less."""
        if not self.scaled or self.block_m > SCALES_PRODUCTS:
            return self
        return self._replace(scaled=False, joined=False, max_registers=None)

    def scales_weights(self, group_size: int) -> bool:
        """Whether whole tiles scale weights; groups of 32 never do."""
        return self.scaled and group_size != 32

    def needs_sums(self, group_size: int) -> bool:
        """Whether the GEMM reads the sums of its input: scaled weights hold the zero points already."""
        return not self.scales_weights(group_size)

    def reads_lanes(self, group_size: int) -> bool:
        """Whether the GEMM reads its input in the order of lanes: its tiles are of few tokens, and scale products."""
        return self.block_m < WARPGROUP_TOKENS and group_size != 32 and self.needs_sums(group_size)

    def fault(self) -> str | None:
        """Return why no kernel has this tile, for tiles that come from a file; None where one may."""
        others = ("scaled", "max_registers", "joined")
        numbers = {name: value for name, value in self._asdict().items() if name not in others}
        if bad := [name for name, value in numbers.items() if type(value) is not int]:
            return f"{bad[0]} must be a number, found {numbers[bad[0]]!r}"
        allowed = {
            "block_m": (8, 16, 32, 64, 128, 256),
            "block_n": (64, 128, 256),
            "split_k": range(1, MAX_SPLIT + 1),
            "num_warps": (4, 8),
            "num_stages": range(1, 9),
            "group_blocks": range(1, 65),
            "tail_m": (0, 8, 16, 32, 64, 128),
        }
        if bad := [name for name, values in allowed.items() if numbers[name] not in values]:
            return f"{bad[0]} is {numbers[bad[0]]}, and must be one of {', '.join(map(str, allowed[bad[0]]))}"
        if self.tail_m >= self.block_m:
            return f"tail_m is {self.tail_m}, and must be less than block_m, {self.block_m}"
        for name in ("scaled", "joined"):
            if type(getattr(self, name)) is not bool:
                return f"{name} must be true or false, found {getattr(self, name)!r}"
        if self.joined and not (self.scaled and self.tail_m >= WARPGROUP_TOKENS):
            return f"joined needs scaled weights and a tail_m of at least {WARPGROUP_TOKENS}, found {self.tail_m}"
        most = self.max_registers
        if most is not None and (type(most) is not int or not 24 <= most <= 255):
            return f"max_registers must be null or from 24 to 255, found {most!r}"
        return None
