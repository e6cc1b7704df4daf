"""Tables and plots of kernel benchmark records: one block a shape, contenders against token counts.

    python -m benchmarks.kernels.report out/moe.json

The benchmarks write both themselves; this makes them again, where the GPU machine had no matplotlib.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernels.timing import microseconds
from benchmarks.records import markdown_table

OURS, WITHOUT = "milo", "milo-no-compensators"

Record = Mapping[str, Any]
Times = dict[str, dict[int, dict[str, Any]]]
"""Rows by contender and token count."""


def by_shape(record: Record) -> dict[str, Times]:
    """Return the rows of a record by shape, contender and token count."""
    shapes: dict[str, Times] = {}
    for row in record["rows"]:
        shapes.setdefault(row["shape"], {}).setdefault(row["contender"], {})[row["tokens"]] = row
    return shapes


def fastest_peer(times: Times, tokens: int) -> dict[str, Any] | None:
    """Return the row of the fastest contender that is not ours; None where no peer was timed."""
    rows = [rows[tokens] for name, rows in times.items() if not name.startswith(OURS) and tokens in rows]
    return min(rows, key=lambda row: row["microseconds"], default=None)


def format_report(record: Record) -> str:
    """Return the whole report in Markdown."""
    device, ceilings = record["environment"], record["ceilings"]
    parts = [
        f"{record['benchmark']} on {device['device']} (torch {device['torch']}, Triton {device['triton']}, "
        f"vLLM {device['vllm']}): copy {ceilings['copy_bandwidth'] / 1e12:.2f} TB/s, "
        f"bf16 matmul {ceilings['matmul_flops'] / 1e12:.0f} TFLOP/s. Microseconds a call, in brackets the fraction "
        "of the roof of that contender's own stored bytes or operations."
    ]
    for shape, times in by_shape(record).items():
        parts.append(f"### {shape}\n\n{_table(times)}")
    if record["errors"]:
        parts.append("Failed:\n\n" + "\n".join(f"- {_failure(error)}" for error in record["errors"]))
    if record["skipped"]:
        parts.append(f"Skipped when the time was up: {len(record['skipped'])} points or contenders.")
    return "\n\n".join(parts)


def _failure(error: Mapping[str, Any]) -> str:
    where = [str(error[key]) for key in ("shape", "contender", "tokens") if key in error]
    return f"{' '.join(where)}: {error['error'].splitlines()[0][:200]}"


def _table(times: Times) -> str:
    tokens = sorted({count for rows in times.values() for count in rows})
    lines = [
        [name, f"{next(iter(rows.values()))['bits_per_weight']:.2f}", *(_cell(rows.get(count)) for count in tokens)]
        for name, rows in times.items()
    ]
    lines += _comparisons(times, tokens)
    return markdown_table(["contender", "bits", *(f"{count} tokens" for count in tokens)], lines)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    return f"{microseconds(row['microseconds'] * 1e-6)} ({row['roof_fraction']:.2f})"


def _comparisons(times: Times, tokens: Sequence[int]) -> Iterator[list[str]]:
    ours = times.get(OURS, {})
    if not ours:
        return
    cells = []
    for count in tokens:
        peer = fastest_peer(times, count)
        if peer is None or count not in ours:
            cells.append("-")
        else:
            cells.append(f"{ours[count]['microseconds'] / peer['microseconds']:.2f} ({peer['contender']})")
    yield [f"{OURS} / fastest peer", "", *cells]
    without = times.get(WITHOUT, {})
    if without:
        yield [
            "overhead of compensators",
            "",
            *(
                f"{ours[count]['microseconds'] / without[count]['microseconds'] - 1:+.1%}"
                if count in ours and count in without
                else "-"
                for count in tokens
            ),
        ]


def plot(record: Record, path: Path) -> str:
    """Draw time against tokens with the roofs of ours; return what was done, in words."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return f"matplotlib is not installed: no plot at {path}"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = by_shape(record)
    if not shapes:
        return "nothing to plot"
    figure, grid = pyplot.subplots(1, len(shapes), figsize=(6 * len(shapes), 5), squeeze=False)
    for axes, (shape, times) in zip(grid[0], shapes.items(), strict=True):
        for name, rows in times.items():
            counts = sorted(rows)
            line = axes.plot(counts, [rows[c]["microseconds"] for c in counts], marker="o", markersize=3, label=name)
            if name == OURS:
                floors = [rows[c]["roof_microseconds"] for c in counts]
                axes.plot(counts, floors, "--", color=line[0].get_color(), label=f"roof of {name}")
        axes.set(xscale="log", yscale="log", title=shape, xlabel="tokens", ylabel="microseconds")
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle(record["environment"]["device"])
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return f"wrote {path}"


def main(words: Sequence[str] | None = None) -> None:
    """Print the table of each record named on the command line and draw its plot beside it."""
    for word in sys.argv[1:] if words is None else words:
        path = Path(word)
        record = json.loads(path.read_text(encoding="utf-8"))
        print(format_report(record))
        print(plot(record, path.with_suffix(".png")))


if __name__ == "__main__":
    main()
