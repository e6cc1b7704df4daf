"""Bytes that a quantized matrix takes on a GPU once it is loaded: in the kernels' layout, which is not that of files.

Sizes are padded, a code of U takes four bits, and a part with any rank holds whole blocks of 16: rank 8 of a matrix of
4096 x 14336 takes 2.14 times what is stored for it, rank 16 takes 1.07 times. The tests hold this to what
:mod:`.serving.layout` makes.
"""

from __future__ import annotations

from .serving.dense.codes import GROUP, SCALE_DTYPE
from .sizes import cdiv
from .weights import RANK_BLOCK
from .weights import rank_blocks as rank_blocks  # part of what this module tells the converter

BLOCK = RANK_BLOCK
UNIT, ROWS = 128, 64
"""Inputs and outputs are padded to whole units and rows, ranks to whole blocks."""
CODE_BYTES = 3 / 8
PAIR_BYTES = 4
"""Of an fp16 scale and a zero point, or of the two fp16 scales of a unit of V."""
SCALE_BYTES = 2
WIDE_BYTES = 3 + SCALE_DTYPE.itemsize / GROUP
"""Of a weight of a layer that a server keeps in 16 bits, compensators added, and for few tokens in 8, scales too."""
_FACTOR_BYTES = {3: (1 / 2, CODE_BYTES), 8: (1.0, 1.0), 16: (2.0, 2.0)}
"""Of an element of U and of V, by how many bits it is stored with."""


def resident_bytes(n: int, k: int, rank: int, group_size: int, factor_bits: int) -> int:
    """Return the bytes of a matrix [n, k] and its compensator on one GPU that holds all of it.

    The tables of a layer and the experts' biases are not counted.

    Args:
        n: outputs.
        k: inputs.
        rank: of the compensator.
        group_size: weights of a row that share a scale and a zero point.
        factor_bits: 3, 8 or 16.
    """
    rows, units, blocks = cdiv(n, ROWS) * ROWS, cdiv(k, UNIT), rank_blocks(rank)
    base = rows * units * (UNIT * CODE_BYTES + UNIT // group_size * PAIR_BYTES)
    up, down = _FACTOR_BYTES[factor_bits]
    up_row = rows * up + rows // ROWS * SCALE_BYTES
    down_row = units * (UNIT * down + PAIR_BYTES)
    return round(base + blocks * BLOCK * (up_row + down_row))
