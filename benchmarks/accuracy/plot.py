"""Plots perplexity against stored bits from results.json of the accuracy benchmark.

python -m benchmarks.accuracy.plot OUT/results.json     # writes OUT/perplexity.png
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.accuracy.scores import spread

MAX_BITS = 4.05


def main() -> None:
    """Plot the result named on the command line."""
    path = Path(sys.argv[1])
    plot(json.loads(path.read_text(encoding="utf-8")), path.with_name("perplexity.png"))


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Write a plot of the sections that compare methods; other sections sweep something else than bits.

    Raises:
        ImportError: matplotlib is missing; the ``bench`` extra has it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install 'vllm-milo[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    groups: dict[str, list[tuple[float, float, float, str]]] = defaultdict(list)
    for row in record["rows"]:
        if row["section"] in ("main", "large") and "error" not in row and row["bits"] <= MAX_BITS:
            found = spread(row["perplexity"])
            groups[row["group"]].append((row["bits"], found.mean, found.spread, row["name"]))
    for group, points in groups.items():
        points.sort()
        bits, means, spreads, names = zip(*points, strict=True)
        curve = group not in ("baseline", "GPTQ", "ours")
        style = "--" if group.startswith("paper") else "-"
        axes.errorbar(
            bits,
            means,
            # spread between sets is mostly common to all methods: shown thin
            yerr=spreads,
            linestyle=style if curve else "none",
            marker="o" if group.startswith("ours") else "x" if group == "GPTQ" else ".",
            elinewidth=0.4,
            label=group,
        )
        if not curve:
            for x, y, name in zip(bits, means, names, strict=True):
                axes.annotate(name, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
    full = next((row for row in record["rows"] if row["name"] == "bf16"), None)
    if full is not None:
        axes.axhline(spread(full["perplexity"]).mean, color="black", linewidth=0.8, label="bf16")
    axes.set_xlabel("stored bits a weight")
    axes.set_ylabel("perplexity")
    axes.set_title(record["model"])
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    main()
