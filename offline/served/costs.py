"""The measured costs of reading codes and factors, from the table beside this module.

The table, ``costs.json``, is what ``benchmarks/kernels/serving_costs.py`` makes of times of layers at one token. Times
are in it as *bytes-equivalents*: the bytes that the device would copy meanwhile, at the bandwidth measured in the same
run. So a device of twice the bandwidth that takes half the time has the same costs.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("costs.json")


class LayerCosts(NamedTuple):
    """What a layer of one kind costs at one token, in bytes-equivalents.

    Attributes:
        layer: of its launches without compensators, beside what they read.
        code_byte: of a byte of codes, scales and zero points that the token reads.
        launch: of V·x, one more launch for each GEMM with compensators.
        factor_byte: of a byte of factors, as the kernels hold them, that the token reads.
    """

    layer: float
    code_byte: float
    launch: float
    factor_byte: float


class Costs(NamedTuple):
    """What dense layers cost (attention, shared experts, dense FFNs), and a layer of routed experts."""

    dense: LayerCosts
    experts: LayerCosts


@cache
def shipped_costs() -> Costs:
    """Return the costs of the table that comes with the package."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    return Costs(*(LayerCosts(*(table[kind][field] for field in LayerCosts._fields)) for kind in Costs._fields))
