"""The main job from end to end: quantize the bundled MoE, serve it with vLLM, answer a request, show the numbers.

python -m benchmarks.demo            # what `make demo` runs, after setting up .venv
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# before torch: matrices of the bundled model are too small for threads
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks.serving.server import post, serve
from vllm_milo.offline.checkpoint.inspect import inspect_checkpoint
from vllm_milo.offline.evaluation.model import load_model
from vllm_milo.offline.evaluation.perplexity import Perplexity, perplexity
from vllm_milo.offline.source.tokens import read_tokens

ASSETS = Path(__file__).resolve().parent.parent / "tests" / "assets"
PROMPT = "In the morning the old man"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    bits: float
    megabytes: float
    perplexity: float


METHODS = {
    "RTN": ["--method", "rtn"],
    "HQQ": ["--method", "hqq"],
    "paper": ["--method", "paper", "--ranks", "dense=16"],
    "balanced": ["--preset", "balanced"],
}
SERVED = "balanced"


def main() -> None:
    """Run the demo; everything goes into the folder OUT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ASSETS / "tiny-qwen2-moe")
    parser.add_argument("--text", type=Path, default=ASSETS / "valid.txt")
    parser.add_argument("--out", type=Path, default=Path("out") / "demo")
    parser.add_argument("--max-windows", type=int, default=60)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    start = time.monotonic()
    folders = {}
    for name, options in METHODS.items():
        folders[name] = out / name.lower()
        milo("quantize", str(arguments.model), "-o", str(folders[name]), "--quiet", *options)
    rows = [source_row(arguments.model, arguments.text, arguments.max_windows)]
    rows += [quantized_row(name, folder, arguments.text, arguments.max_windows) for name, folder in folders.items()]
    ask(folders[SERVED], out / "server.log")
    print_table(rows)
    print(f"done in {time.monotonic() - start:.0f} s; checkpoints and the server's log are in {out}")


def milo(*arguments: str) -> None:
    """Run the command line as a user would."""
    print("$ milo", " ".join(arguments), flush=True)
    subprocess.run([sys.executable, "-m", "vllm_milo.offline.cli", *arguments], check=True)


def ask(checkpoint: Path, log: Path) -> None:
    """Serve a checkpoint and print the answer to one request."""
    print(f"$ vllm serve {checkpoint} --quantization milo", flush=True)
    with serve(checkpoint, "--quantization", "milo", "--max-model-len", "512", "--enforce-eager", log=log) as url:
        answer = post(url, "/v1/completions", prompt=PROMPT, max_tokens=32, temperature=0)
    print(f"POST {url}/v1/completions\n  prompt: {PROMPT!r}\n  answer: {answer['choices'][0]['text']!r}")


def evaluate(folder: Path, text: Path, max_windows: int) -> Perplexity:
    """Return the perplexity of a model or checkpoint."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return perplexity(load_model(folder, device=device), read_tokens(folder, text), max_windows)


def source_row(folder: Path, text: Path, max_windows: int) -> Row:
    """Return the line of the unquantized model."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return Row("bf16", 16, size / 2**20, evaluate(folder, text, max_windows).perplexity)


def quantized_row(name: str, folder: Path, text: Path, max_windows: int) -> Row:
    """Return the line of a MiLo checkpoint."""
    report = inspect_checkpoint(folder)
    found = evaluate(folder, text, max_windows)
    return Row(name, report["bits_per_weight"], report["bytes"] / 2**20, found.perplexity)


def print_table(rows: list[Row]) -> None:
    """Print accuracy and size; bits count scales, zero points and compensators."""
    print(f"\n{'':<28}{'bits a weight':>14}{'MiB':>8}{'perplexity':>12}")
    for row in rows:
        print(f"{row.name:<28}{row.bits:>14.3f}{row.megabytes:>8.2f}{row.perplexity:>12.3f}")
    print()


if __name__ == "__main__":
    main()
