"""Formats results.json of the accuracy benchmark as Markdown tables.

python -m benchmarks.accuracy.report OUT/results.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.scores import spread

Row = Mapping[str, Any]
TITLES = {
    "main": "Methods",
    "large": "Methods",
    "iterations": "Rounds of the paper's method",
    "factors": "Bits of the factors",
    "policies": "Policies at equal bytes, one round",
}


def main() -> None:
    """Print the tables of a result."""
    print(format_report(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))


def format_report(record: Mapping[str, Any]) -> str:
    """Return all tables of a record, and the contenders that failed."""
    parts = [_header(record)]
    for section in dict.fromkeys(row["section"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["section"] == section and "error" not in row]
        parts += [f"## {TITLES[section]}", "\n".join(_score_table(rows)), "\n".join(_error_table(rows))]
    failed = [f"- {row['name']}: {row['error']}" for row in record["rows"] if "error" in row]
    if failed:
        parts += ["## Not measured", "\n".join(failed)]
    return "\n\n".join(parts) + "\n"


def _header(record: Mapping[str, Any]) -> str:
    seeds, windows, window = record["windows"]
    lines = [
        f"# {record['model']}",
        "",
        f"Perplexity over {seeds} disjoint sets of {windows} windows of {window} tokens, mean ± standard deviation "
        f"between sets; float32 arithmetic; {record['device']}, torch {record['torch']}. Bits count codes, scales, "
        "zero points and factors. Gap closed: the share of HQQ's distance to bf16. P: the share that the paper's "
        "method closes at the same bits, its best policy, interpolated between ranks.",
    ]
    shares = record.get("paper_share", {})
    if shares:
        lines += ["", "| bits | P | policy |", "|---|---|---|"]
        lines += [f"| {bits} | {_spread(s['by_seed'], 2)} | {s['policy']} |" for bits, s in shares.items()]
    return "\n".join(lines)


def _score_table(rows: Sequence[Row]) -> Iterator[str]:
    yield "| method | bits a weight | perplexity | gap closed | P at these bits | over P | loss over HQQ, ‰ of a nat |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        bits = f"{row['bits']:.3f}"
        if row.get("bits_fp16_zero", row["bits"]) != row["bits"]:
            bits += f" ({row['bits_fp16_zero']:.3f} with fp16 zeros)"
        columns = [row["name"], bits, _spread(row["perplexity"], 3)]
        columns += [_spread(row.get(key), 2) for key in ("gap_closed", "paper_share", "over_paper")]
        difference = row.get("loss_over", {}).get("HQQ")
        columns.append(f"{1000 * difference['mean']:.1f} ± {1000 * difference['error']:.1f}" if difference else "")
        yield "| " + " | ".join(columns) + " |"


def _error_table(rows: Sequence[Row]) -> Iterator[str]:
    measured = [row for row in rows if row["weight_error"]]
    if not measured:
        return
    kinds = list(measured[0]["weight_error"])
    yield "| relative error, weight / output | " + " | ".join(kinds) + " |"
    yield "|---" * (len(kinds) + 1) + "|"
    for row in measured:
        cells = [
            f"{row['weight_error'][kind]:.4f} / {row['output_error'].get(kind, float('nan')):.4f}" for kind in kinds
        ]
        yield f"| {row['name']} | " + " | ".join(cells) + " |"


def _spread(values: Sequence[float] | None, digits: int) -> str:
    if not values:
        return ""
    found = spread(values)
    return f"{found.mean:.{digits}f} ± {found.spread:.{digits}f}"


if __name__ == "__main__":
    main()
