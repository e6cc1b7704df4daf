"""What compensators cost in serving, as the small table that the converter's allocator and predictions use.

    python -m benchmarks.kernels.serving_costs -o offline/served/costs.json --measure out/costs  # a GPU, 3 minutes
    python -m benchmarks.kernels.serving_costs -o offline/served/costs.json \
      --records benchmarks/results/linear-h100.json benchmarks/results/moe-layer-h100.json

Times of our layers at one token, with compensators and without, come from the records of ``linear.py`` and
``moe_layer.py``; ``--measure`` runs both at several ranks first. A time becomes bytes-equivalents: the bytes that the
device would copy meanwhile, at the bandwidth measured in the same run. A straight line through the layers without
compensators gives what a layer and a byte of codes cost, one through what compensators add what a launch of V·x and a
byte of factors do. Where fewer than three measurements say what compensators add to a layer of experts, a byte costs
there what it costs in dense layers: two points of one rank cannot tell bytes from launches.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.kernels import linear, moe_layer
from benchmarks.kernels.report import OURS, WITHOUT
from benchmarks.records import markdown_table, write_json
from vllm_milo.offline.served.costs import LayerCosts

TOKENS = 1
BENCHMARKS = {"dense": "linear", "experts": "moe_layer"}
"""Which benchmark times the layers of a kind."""
GEMMS = {"dense": 1, "experts": 2}
"""Launches of V·x that a layer has where all its matrices have compensators."""
RANKS = {"dense": (64, 256, 512, 1024), "experts": (16, 64, 256)}
LEAST_ROWS = 3
MANY = 1000
"""Bytes that are written without fractions."""
KNOWN = [
    {"layer": "mixtral-qkv", "ranks": [512, 1024, 1024], "microseconds": [18.2, 18.7]},
    {"layer": "mixtral-o", "ranks": [512], "microseconds": [12.5, 12.6]},
    {"layer": "qwen3-qkv", "ranks": [512, 512, 512], "microseconds": [11.5, 11.9]},
    {"layer": "mixtral experts", "ranks": [64, 64, 64], "microseconds": [68]},
    {"layer": "qwen3 experts", "ranks": [8, 8, 8], "microseconds": [21.6]},
]
"""Times on an H200 that no time without compensators in the same run stands beside, so that nothing is fitted to them:
of ``benchmarks/results/README.md`` (a dense layer of few rows) and ``docs/speed-history.md`` (a layer of experts)."""


class Row(NamedTuple):
    """A layer at one token, without compensators and with them.

    Attributes:
        kind: ``dense`` or ``experts``.
        shape: its name in the benchmark.
        rank: of the compensators.
        code_bytes: that a call moves without compensators.
        factor_bytes: that it moves more with them.
        code_cost: its time without them, in bytes-equivalents.
        factor_cost: what it takes longer with them, likewise.
        source: the record.
        device: where it was timed.
    """

    kind: str
    shape: str
    rank: int
    code_bytes: float
    factor_bytes: float
    code_cost: float
    factor_cost: float
    source: str
    device: str


def rows_of(record: Mapping[str, Any], source: str) -> list[Row]:
    """Return the layers of a record that were timed at one token with compensators and without.

    Raises:
        ValueError: the record is of another benchmark.
    """
    kinds = [kind for kind, name in BENCHMARKS.items() if name == record["benchmark"]]
    if not kinds:
        raise ValueError(f"{source}: is a record of {record['benchmark']}, not of {' or '.join(BENCHMARKS.values())}")
    bandwidth = record["ceilings"]["copy_bandwidth"]
    timed = {(row["shape"], row["contender"]): row for row in record["rows"] if row["tokens"] == TOKENS}
    found = []
    for (shape, contender), row in timed.items():
        bare = timed.get((shape, WITHOUT))
        if contender != OURS or bare is None:
            continue
        found.append(
            Row(
                kinds[0],
                shape,
                max(row["ranks"]) if "ranks" in row else row["rank"],
                bare["bytes"],
                row["bytes"] - bare["bytes"],
                bare["microseconds"] * 1e-6 * bandwidth,
                (row["microseconds"] - bare["microseconds"]) * 1e-6 * bandwidth,
                source,
                record["environment"]["device"],
            )
        )
    return found


def fit(rows: Sequence[Row]) -> dict[str, LayerCosts]:
    """Return the costs of dense layers and of layers of experts.

    Raises:
        ValueError: too few layers were measured, or their times do not grow with their bytes.
    """
    dense = _of_kind([row for row in rows if row.kind == "dense"], "dense", None)
    experts = _of_kind([row for row in rows if row.kind == "experts"], "experts", dense.factor_byte)
    return {"dense": dense, "experts": experts}


def _of_kind(rows: Sequence[Row], kind: str, factor_byte: float | None) -> LayerCosts:
    """Return the costs of one kind; ``factor_byte`` is what holds where too few rows say what a byte costs."""
    if len(rows) < LEAST_ROWS and (factor_byte is None or not rows):
        raise ValueError(f"{kind}: {len(rows)} rows are too few; measure more shapes or ranks")
    bare = {(row.source, row.shape): (row.code_bytes, row.code_cost) for row in rows}
    if len({code_bytes for code_bytes, _ in bare.values()}) < 2:
        raise ValueError(f"{kind}: {len(rows)} rows of layers of one size; measure more shapes")
    layer, code_byte = _line(bare.values())
    if len(rows) >= LEAST_ROWS:
        added, factor_byte = _line((row.factor_bytes, row.factor_cost) for row in rows)
    else:
        assert factor_byte is not None
        added = sum(row.factor_cost - factor_byte * row.factor_bytes for row in rows) / len(rows)
    if not (code_byte > 0 and factor_byte > 0):
        raise ValueError(
            f"{kind}: by these times a byte of codes costs {code_byte:.3g} and one of factors {factor_byte:.3g} bytes; "
            f"measure again on a device that nothing else uses"
        )
    return LayerCosts(max(0.0, layer), code_byte, max(0.0, added) / GEMMS[kind], factor_byte)


def _line(points: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Return where the straight line nearest to some points begins, and its slope."""
    xs, ys = zip(*points, strict=True)
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((one - x) ** 2 for one in xs)
    if not spread:
        raise ValueError("all layers add the same bytes; measure other ranks or shapes too")
    slope = sum((one - x) * (other - y) for one, other in zip(xs, ys, strict=True)) / spread
    return y - slope * x, slope


def table_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the table: costs, the measurements that they come from, and what is known beside them."""
    costs = fit(rows)
    return {
        "unit": "bytes that the device copies in the same time, a layer at one token",
        **{kind: {name: _rounded(value) for name, value in of._asdict().items()} for kind, of in costs.items()},
        "measured": [
            {**row._asdict(), "predicted_factor_cost": predicted(row, costs)}
            for row in sorted(rows, key=lambda row: (row.kind, row.shape, row.rank))
        ],
        "known": {
            "device": "NVIDIA H200",
            "fitted": False,
            "source": "docs/speed-history.md, results/README.md",
            "rows": KNOWN,
        },
    }


def _rounded(value: float) -> float:
    return round(value) if value >= MANY else round(value, 3)


def predicted(row: Row, costs: Mapping[str, LayerCosts]) -> float:
    """Return what compensators add to a measured layer by the fitted costs, in bytes-equivalents."""
    of = costs[row.kind]
    return GEMMS[row.kind] * of.launch + of.factor_byte * row.factor_bytes


def format_table(table: Mapping[str, Any]) -> str:
    """Return the measurements beside what the costs predict, as Markdown; shares are of the layer without them."""
    lines = []
    for row in table["measured"]:
        shares = (row[key] / row[of] for key, of in _SHARES)
        lines.append([row["kind"], row["shape"], str(row["rank"]), *(f"{share:.1%}" for share in shares)])
    return markdown_table(["kind", "layer", "rank", "bytes", "time", "predicted time"], lines)


_SHARES = (
    ("factor_bytes", "code_bytes"),
    ("factor_cost", "code_cost"),
    ("predicted_factor_cost", "code_cost"),
)


def measure(folder: Path, words: Sequence[str]) -> list[Path]:
    """Run both benchmarks at one token and each rank; return their records.

    Args:
        folder: where the records go.
        words: further options of both.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for kind, main in (("dense", linear.main), ("experts", moe_layer.main)):
        for rank in RANKS[kind]:
            records.append(folder / f"{kind}-{rank}.json")
            contenders = f"{OURS},{WITHOUT}"
            fixed = ["--tokens", str(TOKENS), "--rank", str(rank), "--contenders", contenders]
            main(["-o", str(records[-1]), *fixed, *words])
    return records


def main(words: Sequence[str] | None = None) -> None:
    """Write the table that the command line asks for, and print what it is made of."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--measure", type=Path, metavar="FOLDER", help="time layers first; their records go here")
    how.add_argument("--records", type=Path, nargs="+", metavar="FILE", help="of linear.py and moe_layer.py")
    arguments, more = parser.parse_known_args(words)
    if more and arguments.records:
        parser.error(f"unknown options: {' '.join(more)}")
    records = arguments.records or measure(arguments.measure, more)
    rows = [row for path in records for row in rows_of(json.loads(path.read_text(encoding="utf-8")), path.name)]
    table = table_of(rows)
    write_json(arguments.output, table)
    print(format_table(table))


if __name__ == "__main__":
    main()
