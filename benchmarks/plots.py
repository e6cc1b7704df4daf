"""The README's plots, from files of results: KL divergence over bits, throughput over requests at once.

    python -m benchmarks.plots divergence benchmarks/results/real-weights-qwen2-0.5b-h200.json -o docs/divergence.png
    python -m benchmarks.plots traffic out/traffic.json -o docs/traffic.png [--model mixtral]

The first reads what ``benchmarks.divergence`` writes, the second what ``benchmarks.serving.traffic`` does; where
that file joins several records as ``runs``, ``--model`` names one. Needs matplotlib; the ``bench`` extra has it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving.traffic import SHORT_ANSWER, summary

OURS = ("fast", "small", "balanced", "best", "milo")
"""Names of rows that are this project's begin so."""
OUR_COLORS = ("tab:red", "tab:orange", "tab:pink", "darkred")
OTHER_COLORS = ("tab:blue", "tab:green", "tab:purple", "tab:gray", "tab:brown")


def main(words: Sequence[str] | None = None) -> None:
    """Draw what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("result", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--model", help="of traffic, where a file has several records")
    arguments = parser.parse_args(words)
    record = json.loads(arguments.result.read_text(encoding="utf-8"))
    if arguments.kind == "traffic":
        record = _one(record, arguments.model, arguments.result)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    KINDS[arguments.kind](record, arguments.output)


def _one(record: dict[str, Any], model: str | None, file: Path) -> dict[str, Any]:
    """Return the record of a model; without its name, the only one.

    Raises:
        SystemExit: there is no such record, or several.
    """
    runs = record.get("runs", [record])
    found = [run for run in runs if model in (None, run["model"])]
    if len(found) != 1:
        models = ", ".join(run["model"] for run in runs)
        raise SystemExit(f"{file}: has records of {models}; name one of them with --model")
    return found[0]


def draw_divergence(record: Mapping[str, Any], path: Path) -> None:
    """Draw each method's mean KL divergence over its stored bits."""
    figure, axes = _axes()
    for row in record["rows"]:
        ours = row["name"].startswith(OURS)
        axes.plot(row["bits"], row["mean_kl"], "o" if ours else "x", color=(OUR_COLORS if ours else OTHER_COLORS)[0])
        axes.annotate(row["name"], (row["bits"], row["mean_kl"]), fontsize=8, xytext=(5, 3), textcoords="offset points")
    axes.set_xlabel("stored bits a weight, scales, zero points and compensators counted")
    axes.set_ylabel("KL divergence from bf16, nats a token")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.15)
    axes.set_title(record["model"], fontsize=9)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def draw_traffic(record: Mapping[str, Any], path: Path) -> None:
    """Draw each contender's output tokens a second over the requests at once, a panel for each load.

    Loads that ask for first tokens alone are left out: their answers are no throughput of tokens.
    """
    rows = [row for row in summary(record) if row["load"][1] > SHORT_ANSWER]
    loads = sorted({tuple(row["load"]) for row in rows})
    figure, panels = _axes(len(loads))
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    colors = contender_colors(contenders)
    for axes, load in zip(panels if len(loads) > 1 else [panels], loads, strict=True):
        for name in contenders:
            points = sorted(
                (row["concurrency"], *row["tokens_per_second"])
                for row in rows
                if row["contender"] == name and tuple(row["load"]) == load
            )
            if not points:  # the run was cut off before
                continue
            x, median, low, high = zip(*points, strict=True)
            axes.plot(x, median, "-o", color=colors[name], label=name)
            axes.fill_between(x, low, high, color=colors[name], alpha=0.2)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sorted({row["concurrency"] for row in rows if tuple(row["load"]) == load}))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_xlabel("requests at once")
        axes.set_title(f"{load[0]} tokens in, {load[1]} out", fontsize=9)
    (panels if len(loads) == 1 else panels[0]).set_ylabel("output tokens a second")
    (panels if len(loads) == 1 else panels[0]).legend(fontsize=8)
    about = record["environment"]
    figure.suptitle(
        f"{record['model']}, {record['layers']} layers, vLLM {about['vllm']}, {about['device']}", fontsize=9
    )
    figure.savefig(path, dpi=110, bbox_inches="tight")


def contender_colors(names: Sequence[str]) -> dict[str, str]:
    """Return a color for each contender, the project's own in shades of red."""
    found: dict[str, str] = {}
    for colors, ours in ((OUR_COLORS, True), (OTHER_COLORS, False)):
        mine = [name for name in names if name.startswith(OURS) == ours]
        found |= {name: colors[index % len(colors)] for index, name in enumerate(mine)}
    return found


def _axes(columns: int = 1) -> tuple[Any, Any]:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the plots need matplotlib: pip install 'vllm-milo[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(6.5 if columns == 1 else 4.5 * columns, 4), squeeze=True)


KINDS: dict[str, Callable[[Mapping[str, Any], Path], None]] = {"divergence": draw_divergence, "traffic": draw_traffic}

if __name__ == "__main__":
    main()
