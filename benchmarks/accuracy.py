"""Perplexity against stored bits of every method on one model and text; a table and JSON.

    python benchmarks/accuracy.py MODEL --text FILE -o OUT.json --dense 32 --sparse 8

Each method is converted to a checkpoint by the public path and read back, so the bits are those on disk: codes,
scales, zero points and factors of the quantized matrices.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_milo import __version__
from vllm_milo.offline.convert import Conversion, convert
from vllm_milo.offline.evaluate import count_experts_used, load_model, perplexity, read_tokens
from vllm_milo.offline.inspect import inspect_checkpoint
from vllm_milo.offline.milo import Recipe
from vllm_milo.offline.ranks import needs_counts, parse_policies

COUNT_WINDOWS = 16


class Contender(NamedTuple):
    """A row of the table: a method and its ranks."""

    name: str
    method: str
    ranks: str = ""


def contenders(dense: int, sparse: int) -> list[Contender]:
    """Return the baselines and MiLo with each rank policy at comparable ranks."""
    policies = [
        f"uniform={sparse}",
        f"dense={dense}",
        f"sparse={sparse}",
        f"kurtosis={sparse}",
        "kurtosis-paper=16",
        f"frequency={sparse}",
        f"dense={dense},kurtosis={sparse}",
        f"dense={2 * dense},kurtosis={sparse}",
    ]
    return [
        Contender("RTN", "rtn"),
        Contender("HQQ", "hqq"),
        *(Contender(f"MiLo {policy}", "paper", policy) for policy in policies),
    ]


def main() -> None:
    """Measure all contenders and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--dense", type=int, default=32, help="rank of attention and shared experts")
    parser.add_argument("--sparse", type=int, default=8, help="mean rank of routed experts")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-windows", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    rows = list(measure(arguments))
    for row in rows:
        row["gap_closed"] = gap_closed(row, rows)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    record = {"model": arguments.model.name, "text": arguments.text.name, **environment(arguments), "rows": rows}
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")
    print(format_table(rows))


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row a contender: name, bits, perplexity, seconds."""
    tokens = read_tokens(arguments.model, arguments.text)
    source = load_model(arguments.model, device=arguments.device)
    yield {"name": "bf16", "bits": 16.0, **score(source, tokens, arguments)}
    entries = contenders(arguments.dense, arguments.sparse)
    counts = {}
    if any(needs_counts(parse_policies(entry.ranks)) for entry in entries):
        # from the end of the text, which the windows below do not reach
        counts = count_experts_used(source, tokens[-COUNT_WINDOWS * arguments.window :])
    for entry in entries:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            conversion = Conversion(
                Recipe(method=entry.method), parse_policies(entry.ranks), expert_counts=counts, device=arguments.device
            )
            out = convert(arguments.model, Path(folder) / "out", conversion, progress=False).out
            seconds = time.monotonic() - start
            report = inspect_checkpoint(out)
            model = load_model(out, device=arguments.device)
        row = {"name": entry.name, "bits": report["bits_per_weight"], **score(model, tokens, arguments)}
        row |= {"relative_error": report["relative_error"], "seconds": round(seconds, 1)}
        print(f"{row['name']:<36}{row['bits']:8.3f}{row['perplexity']:10.4f}", flush=True)
        yield row


def score(model: Any, tokens: torch.Tensor, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return perplexity and protocol."""
    found = perplexity(model, tokens, arguments.max_windows, window=arguments.window, stride=arguments.window)
    return {"perplexity": found.perplexity, "windows": found.windows, "protocol": found.protocol}


def gap_closed(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the share of HQQ's distance to bf16 in perplexity that a row closes."""
    best, worst = (next(r["perplexity"] for r in rows if r["name"] == name) for name in ("bf16", "HQQ"))
    return (worst - row["perplexity"]) / (worst - best)


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the numbers were made with."""
    device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else platform.machine()
    return {"vllm_milo": __version__, "torch": torch.__version__, "device": device}


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| method | bits a weight | perplexity | gap closed |", "|---|---|---|---|"]
    lines += [
        f"| {row['name']} | {row['bits']:.3f} | {row['perplexity']:.3f} | {row['gap_closed']:.2f} |" for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
