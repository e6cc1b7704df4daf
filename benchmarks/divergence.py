"""KL divergence from the original model, by preset and method, on a model and texts of yours.

    python -m benchmarks.divergence MODEL --text FILE [FILE ...] -o OUT [--device cuda] [--only fast balanced]

Quantizes MODEL by ``milo quantize`` with each contender's options and measures it as ``milo eval --reference`` does: KL
divergence, top-1 agreement and perplexity of each text, stored bits, router flips, and the share of HQQ's KL divergence
that is closed. Contenders by the name of GPTQ are not ``milo quantize``'s: they are calibrated on the same text and
written as models with dequantized weights. Takes windows from the start of the texts, which no contender may have been
calibrated on. Writes OUT/divergence.json and prints a table. A contender that is there already is not made again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.gptq import Gptq
from benchmarks.records import environment, markdown_table, write_json
from benchmarks.streamed_gptq import write_gptq
from vllm_milo.offline.checkpoint.inspect import inspect_checkpoint
from vllm_milo.offline.cli import main as milo
from vllm_milo.offline.evaluation.divergence import Divergence, divergence, open_streamed, text_windows

HQQ = "HQQ g64"
CONTENDERS: dict[str, list[str] | Gptq] = {
    HQQ: ["--method", "hqq"],
    "RTN g64": ["--method", "rtn"],
    "least squares g64": ["--method", "mse"],
    "paper-s1": ["--preset", "paper-s1"],
    "fast": ["--preset", "fast"],
    "balanced": [],
    "balanced, own text": ["--calibration", "self"],
    "best": ["--preset", "best"],
    "small": ["--preset", "small"],
    "GPTQ g64": Gptq(64, act_order=True),
    "GPTQ g32": Gptq(32, act_order=True),
}


def main() -> None:
    """Run the contenders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, dtype="bfloat16")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    arguments = parser.parse_args()
    names = [HQQ, *(name for name in arguments.only if name != HQQ)]
    rows: list[dict[str, Any]] = []
    content = record(arguments, rows)
    for name in names:
        rows.append(run(name, arguments))
        rows[-1]["share"] = 1 - rows[-1]["mean_kl"] / rows[0]["mean_kl"]
        write_json(arguments.output / "divergence.json", content)  # each at once: the next may take an hour
        print(table(rows, [text.name for text in arguments.text]), flush=True)


def add_arguments(parser: argparse.ArgumentParser, dtype: str) -> None:
    """Add what measuring contenders on texts takes; ``dtype`` is the default of activations."""
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=dtype)
    parser.add_argument("--max-windows", type=int, default=60, help="of each text")


def record(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a file of results holds; ``rows`` may still grow."""
    return {
        "model": arguments.model.name,
        "environment": environment(torch.device(arguments.device)),
        "dtype": arguments.dtype,
        "rows": rows,
    }


def run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the row of one contender."""
    out = arguments.output / name.replace(" ", "-").replace(",", "")
    start = time.monotonic()
    if not out.exists():
        quantize(name, arguments.model, out, arguments.device)
    seconds = time.monotonic() - start
    texts = {text.name: measure(out, text, arguments)._asdict() for text in arguments.text}
    mean = sum(scores["kl"] for scores in texts.values()) / len(texts)
    how = CONTENDERS[name]
    bits = how.bits if isinstance(how, Gptq) else inspect_checkpoint(out)["bits_per_weight"]
    return {"name": name, "bits": bits, "seconds": seconds, "mean_kl": mean, "texts": texts}


def quantize(name: str, model: Path, out: Path, device: str) -> None:
    """Make the folder of one contender."""
    how = CONTENDERS[name]
    if isinstance(how, Gptq):
        write_gptq(model, out, how, torch.device(device))
    elif milo(["quantize", str(model), "-o", str(out), "--device", device, "--quiet", *how]) != 0:
        raise SystemExit(f"{name}: milo quantize failed; see above")


def measure(out: Path, text: Path, arguments: argparse.Namespace) -> Divergence:
    """Return how far a checkpoint is from the model on a text."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    windows = text_windows(out, arguments.model, text, 512, arguments.max_windows)
    return divergence(open_streamed(out, device, dtype), open_streamed(arguments.model, device, dtype), windows)


def table(rows: list[dict[str, Any]], texts: list[str]) -> str:
    """Return the rows as a Markdown table."""
    header = [
        "method",
        "bits",
        "seconds",
        *(f"{text}: KL, top-1, perplexity" for text in texts),
        "router flips",
        "share of HQQ's KL closed",
    ]
    body = []
    for row in rows:
        scores = [row["texts"][text] for text in texts]
        cells = [f"{one['kl']:.4f}, {one['top1']:.3f}, {one['perplexity']:.2f}" for one in scores]
        first = [row["name"], f"{row['bits']:.3f}", f"{row['seconds']:.0f}"]
        body.append([*first, *cells, _flips(scores), f"{row['share']:.3f}"])
    return markdown_table(header, body)


def _flips(scores: list[dict[str, Any]]) -> str:
    """Return the share of the tokens that went to other experts, the mean over texts."""
    found = [one["router_flips"] for one in scores if one["router_flips"] is not None]
    return f"{sum(found) / len(found):.4f}" if found else "-"


if __name__ == "__main__":
    main()
