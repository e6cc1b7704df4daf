"""What quantizing at load costs: vLLM's engine with MiLo and with its own rounding to nearest, beside bf16.

    python -m benchmarks.accuracy.at_load.run MODEL --text FILE [FILE ...] -o out/at_load.json
        [--only bf16 milo rtn3-g64] [--max-windows 40] [--window 512] [--top 256]

MODEL is a folder of a 16-bit model. Each contender is one start of vLLM in a process of its own, without torch.compile
and CUDA graphs; one that fails is recorded, and the others go on. It then answers the same windows of the texts as
prompts, and vLLM returns the log-probabilities of each position's --top likeliest tokens. KL divergence is from bf16's
predictions, over the tokens that both models name and one more that stands for all others: at most the divergence over
the whole vocabulary. What probability bf16 gives the named ones is printed beside it; with --top of the vocabulary's
size it is exact. Perplexities and agreement are exact either way.

"milo" is `vllm serve MODEL --quantization milo`. "rtn3-g64" and its like are `vllm serve MODEL --quantization humming`
with VLLM_HUMMING_ONLINE_QUANT_CONFIG, which rounds to 3 or 4 bits in groups of so many weights, without zero points
unless the name says so, and needs a CUDA GPU. All keep head and routers in 16 bits. Bits a weight are those of the
format, and those that the weights take in memory once they are loaded, paddings and copies included.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.accuracy.at_load.contenders import CONTENDERS, REFERENCE
from benchmarks.accuracy.at_load.predictions import Predictions, distance
from benchmarks.processes import run_main
from benchmarks.records import markdown_table, write_json
from benchmarks.serving.decode import ENVIRONMENT, SHOWN_LOG
from vllm_milo.offline.evaluation.divergence import text_windows
from vllm_milo.offline.source.config import read_text_settings

Sizes = Mapping[str, Sequence[int]]
"""Bytes and number of elements of a model's tensors by name."""


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all contenders, bf16 first; the record is written after each.

    Raises:
        ConversionError: a text cannot be read, or does not fill a window.
    """
    model = arguments.model.resolve()
    positions = read_text_settings(model).get("max_position_embeddings") or arguments.window + 1
    arguments.window = min(arguments.window, positions - 1)  # vLLM generates a token after each
    texts = {text.name: text_windows(model, model, text, arguments.window, arguments.max_windows)
             for text in arguments.text}  # fmt: skip
    record: dict[str, Any] = {
        "benchmark": "at_load",
        "model": model.name,
        "dtype": arguments.dtype,
        "window": arguments.window,
        "top": arguments.top,
        "windows": {name: len(windows) for name, windows in texts.items()},
        "rows": [],
    }
    reference: dict[str, Any] | None = None
    with tempfile.TemporaryDirectory() as name:
        windows = Path(name) / "windows"
        save_file({"windows": torch.cat(list(texts.values()))}, windows)
        for contender in sorted(arguments.only, key=lambda name: name != REFERENCE):
            row, predictions = measure(contender, model, windows, Path(name) / contender, arguments)
            if predictions is not None:
                found = {"predictions": predictions, "tensors": row.pop("tensors")}
                reference = found if contender == REFERENCE else reference
                row |= scores(found, reference, texts)
            record["rows"].append(row)
            write_json(arguments.output, record)
            print(f"{contender}: {row['total_seconds']:.0f} s{', FAILED' if 'error' in row else ''}", flush=True)
    return record


def measure(
    contender: str, model: Path, windows: Path, folder: Path, arguments: argparse.Namespace
) -> tuple[dict[str, Any], Predictions | None]:
    """Run one contender in a process of its own; return its row and predictions, or a row with an ``error``."""
    way = CONTENDERS[contender]
    engine = {
        "max_model_len": arguments.window + 1,
        "max_num_seqs": 8,
        "max_logprobs": arguments.top,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "dtype": arguments.dtype,
        "gpu_memory_utilization": arguments.gpu_memory,
        **({"kv_cache_memory_bytes": int(arguments.kv_gib * 2**30)} if torch.cuda.is_available() else {}),
        **way.engine,
    }
    folder.mkdir()
    job = {"folder": str(model), "engine": engine, "windows": str(windows), "top": arguments.top, "out": str(folder)}
    (folder / "job.json").write_text(json.dumps(job))
    unwanted = ("TRITON_INTERPRET", "VLLM_HUMMING_ONLINE_QUANT_CONFIG")
    environment = {key: value for key, value in os.environ.items() if key not in unwanted}
    environment |= ENVIRONMENT | dict(way.environment)
    row: dict[str, Any] = {"contender": contender, "format_bits": way.bits}
    start = time.monotonic()
    log, word, seconds = folder / "vllm.log", str(folder / "job.json"), arguments.contender_seconds
    code = run_main(
        "benchmarks.accuracy.at_load.worker", word, folder=folder, log=log, environment=environment, seconds=seconds
    )
    row["total_seconds"] = time.monotonic() - start
    noted = folder / "noted.json"
    if code != 0 or not noted.exists():
        end = log.read_text(errors="replace")[-SHOWN_LOG:]
        return row | {"error": f"vLLM ended with {code}: ...{end}"}, None
    return row | json.loads(noted.read_text()), Predictions.read(folder / "predictions")


def scores(
    found: Mapping[str, Any], reference: Mapping[str, Any] | None, texts: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """Return memory, and what a contender makes of each text; no distances where bf16 failed."""
    row: dict[str, Any] = {"weight_bytes": sum(size for size, _ in found["tensors"].values()), "texts": {}}
    if reference is not None:
        row["resident_bits"] = resident_bits(found["tensors"], reference["tensors"])
    start = 0
    for name, windows in texts.items():
        stop = start + windows.shape[0] * (windows.shape[1] - 1)
        mine = found["predictions"].part(start, stop)
        row["texts"][name] = {"perplexity": mine.perplexity, "tokens": stop - start}
        if reference is not None:
            row["texts"][name] |= distance(mine, reference["predictions"].part(start, stop))._asdict()
        start = stop
    return row


def resident_bits(tensors: Sizes, reference: Sizes) -> float | None:
    """Return the bits that a quantized weight takes in memory; None where nothing is quantized.

    What has the name and size of one of bf16's tensors is kept. All else is what the rest of bf16's was quantized to.
    """
    kept = {name for name, size in tensors.items() if list(size) == list(reference.get(name, ()))}
    weights = sum(number for name, (_, number) in reference.items() if name not in kept)
    return 8 * sum(size for name, (size, _) in tensors.items() if name not in kept) / weights if weights else None


def format_report(record: Mapping[str, Any]) -> str:
    """Return the table, and what failed."""
    good = [row for row in record["rows"] if "error" not in row]
    about = good[0]["environment"] if good else {"device": "?", "vllm": "?"}
    title = (
        f"Quantized at load in vLLM {about['vllm']} on {about['device']}: {record['model']}, windows of "
        f"{record['window']} tokens. KL divergence (nats) from {REFERENCE} is a lower bound where the named tokens' "
        f"probability, in brackets, is below 1."
    )
    header = ["contender", "bits a weight", "in memory", "load, s", "weights, GiB", "peak at load, GiB"]
    header += [f"{name}: KL, top-1, perplexity" for name in record["windows"]]
    lines = [
        [
            row["contender"],
            _cell(row["format_bits"] or 16, ".2f"),
            _cell(row.get("resident_bits"), ".2f"),
            f"{row['load_seconds']:.1f}",
            f"{row['weight_bytes'] / 2**30:.3f}",
            _cell(row["load_peak_bytes"] and row["load_peak_bytes"] / 2**30, ".2f"),
            *(_scores(row["texts"][name]) for name in record["windows"]),
        ]
        for row in good
    ]
    failed = [f"- {row['contender']}: {row['error'][-300:]}" for row in record["rows"] if "error" in row]
    return "\n\n".join([title, markdown_table(header, lines), *(["Failed:", "\n".join(failed)] if failed else [])])


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _scores(text: Mapping[str, float]) -> str:
    if "kl" not in text:
        return f"-, -, {text['perplexity']:.3f}"
    return f"{text['kl']:.4f} ({text['known']:.3f}), {text['top1']:.3f}, {text['perplexity']:.3f}"


def main(words: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for; write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON; the table goes beside it")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--max-windows", type=int, default=40, help="of each text")
    parser.add_argument("--window", type=int, default=512, help="tokens; fewer where the model has no room for them")
    parser.add_argument("--top", type=int, default=256, help="likeliest tokens of a position")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kv-gib", type=float, default=4.0, help="memory of the KV cache, on a GPU")
    parser.add_argument("--gpu-memory", type=float, default=0.9, help="vLLM's gpu_memory_utilization")
    parser.add_argument("--contender-seconds", type=float, default=600, help="stop a contender after this long")
    arguments = parser.parse_args(words)
    if len({text.name for text in arguments.text}) < len(arguments.text):
        parser.error("--text: two files have the same name")
    text = format_report(run(arguments))
    arguments.output.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
