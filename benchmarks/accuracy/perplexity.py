"""Perplexity against stored bits of every method on one model and text: JSON, tables and a plot.

    python -m benchmarks.accuracy.perplexity MODEL --text FILE -o OUT --jobs 4

OUT gets results.json (after every row), results.md and perplexity.png. Contenders are calls of `milo quantize`, so
their bits are those on disk; GPTQ is ``gptq.py``. The last part of the text is for calibration, expert counts and
output errors and is not scored. `--section` chooses what to compare: main (methods, ranks, presets), iterations,
factors, policies.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.accuracy.contenders import SECTIONS, Contender
from benchmarks.accuracy.plot import plot
from benchmarks.accuracy.report import format_report
from benchmarks.accuracy.run import Benchmark, Settings
from vllm_milo.offline.source.tokens import read_tokens


def main() -> int:
    """Measure; return 1 where a contender could not be measured."""
    arguments = _parser().parse_args()
    start = time.monotonic()
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    scored, calibration = split_text(arguments.text, arguments.calibration, output)
    settings = Settings(
        window=arguments.window,
        windows=arguments.windows,
        seeds=arguments.seeds,
        calibration_windows=arguments.calibration_windows,
        batch=arguments.batch,
        rounds=arguments.rounds,
        device=arguments.device,
        quantize_device=arguments.quantize_device or arguments.device,
        jobs=arguments.jobs,
        deadline=start + arguments.max_seconds,
    )
    bench = Benchmark(
        folder=arguments.model,
        tokens=read_tokens(arguments.model, scored),
        calibration_tokens=read_tokens(arguments.model, calibration),
        calibration_text=calibration,
        output=output,
        settings=settings,
        record={"model": arguments.model.resolve().name, "text": arguments.text.name},
    )
    bench.run(arguments.section, arguments.only, [_extra(text) for text in arguments.add])
    return finish(bench, start)


def finish(bench: Benchmark, start: float) -> int:
    """Write tables and plot; return 1 where a contender could not be measured."""
    bench.save({"seconds": round(time.monotonic() - start, 1)})
    report = format_report(bench.contents())
    (bench.output / "results.md").write_text(report, encoding="utf-8")
    print(report)
    try:
        plot(bench.contents(), bench.output / "perplexity.png")
    except ImportError as error:
        print(f"no plot: {error}", file=sys.stderr)
    failures = bench.failures()
    if failures:
        print(f"{len(failures)} contenders were not measured:\n" + "\n".join(failures), file=sys.stderr)
    return 1 if failures else 0


def split_text(text: Path, calibration: Path | None, output: Path, share: float = 0.3) -> tuple[Path, Path]:
    """Return files of what is scored and what calibrates: two texts, or the two parts of one, cut at a line."""
    if calibration is not None:
        return text, calibration
    content = text.read_text(encoding="utf-8")
    cut = content.find("\n", int(len(content) * (1 - share))) + 1
    if cut == 0:
        raise ValueError(f"{text}: no line break in its last part to cut it at; pass --calibration FILE")
    parts = output / "scored.txt", output / "calibration.txt"
    for path, part in zip(parts, (content[:cut], content[cut:]), strict=True):
        path.write_text(part, encoding="utf-8")
    return parts


def _extra(text: str) -> Contender:
    name, _, arguments = text.partition("=")
    return Contender(name, "added", tuple(shlex.split(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections: Sequence[str] = list(SECTIONS)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--calibration", type=Path, help="text for calibration (default: the last 30 %% of --text)")
    parser.add_argument("--section", nargs="+", choices=sections, default=["main"])
    parser.add_argument("--only", default="", help="only contenders whose names match this pattern (and HQQ)")
    parser.add_argument("--add", action="append", default=[], metavar="NAME=ARGUMENTS", help="one more contender")
    parser.add_argument("--window", type=int, default=Settings.window)
    parser.add_argument("--windows", type=int, default=Settings.windows, help="of a seed, at most")
    parser.add_argument("--seeds", type=int, default=Settings.seeds)
    parser.add_argument("--calibration-windows", type=int, default=Settings.calibration_windows)
    parser.add_argument("--batch", type=int, default=Settings.batch, help="windows of a forward pass")
    parser.add_argument("--rounds", type=int, default=Settings.rounds, help="cap for the paper's method")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quantize-device", help="where `milo quantize` runs (default: --device)")
    parser.add_argument("--jobs", type=int, default=1, help="processes of `milo quantize`")
    parser.add_argument("--max-seconds", type=float, default=3600, help="give up contenders after this time")
    return parser


if __name__ == "__main__":
    sys.exit(main())
