"""Decode latency, throughput and weight memory in vLLM with dummy weights: MiLo against int4, bf16, Humming.

    python -m benchmarks.serving.decode -o out/serve.json    # Mixtral-8x7B's shapes, 8 layers
    python -m benchmarks.serving.decode -o out/serve.json --model qwen3 --layers 48 --contenders milo-s1,bf16
    python -m benchmarks.serving.decode -o out/serve.json --model qwen3 --prefill 1024,8192 --alike-routes

One process and one start of vLLM for each contender: torch.compile and CUDA graphs on, graphs for the measured
batches only. The latency of a decoding step is the difference of two output lengths, divided by the tokens between.
``--prefill`` also times steps that only read prompts, and says what their kernels take: a step that takes longer than
these has waited for the host. ``--alike-routes`` gives all contenders the same routes (:mod:`.dummy.routing`).
milo-s1 and milo-s2 have the ranks of the paper's two strategies: dense layers 1/8 and 1/4 of the hidden size,
experts 16 and 32, factors in 3 bits.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.processes import run_main
from benchmarks.records import markdown_table, write_json
from benchmarks.serving.contenders import CONTENDERS, write_model
from benchmarks.serving.dummy.routing import require_table
from benchmarks.serving.models import MODELS, kv_bytes
from benchmarks.serving.worker import PREFILL_PROMPT

MAX_MODEL_LEN = 512
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}
SHOWN_LOG = 4000
KERNEL_LINES = re.compile(r"(?:Using .*(?:backend|[Kk]ernel)|milo::|MiLo keeps).*")
"""What vLLM and the plugin log of the kernels they chose."""


def job(folder: Path, config: Mapping[str, Any], contender: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the worker needs to know."""
    sequences = max([*arguments.batches, *(tokens // PREFILL_PROMPT for tokens in arguments.prefill)])
    engine = {
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": sequences,
        "max_num_batched_tokens": max([4096, *arguments.prefill]),
        "kv_cache_memory_bytes": int(1.1 * kv_bytes(dict(config), sequences * MAX_MODEL_LEN)) + 2**26,
        "enable_prefix_caching": False,
        "compilation_config": {"cudagraph_capture_sizes": arguments.batches},
        "enforce_eager": arguments.eager,
        "moe_backend": CONTENDERS[contender].moe_backend,
    }
    return {
        "folder": str(folder),
        "engine": engine,
        "vocab": config["vocab_size"],
        "batches": arguments.batches,
        "throughput": {"prompts": arguments.prompts, "input": 128, "output": 128},
        "profile": arguments.profile,
        "prefill": arguments.prefill,
        "alike_routes": arguments.alike_routes,
    }


def measure(contender: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one contender in a process of its own and return its row; a failure's row has an ``error``.

    Raises:
        RuntimeError: its routers did not choose by the table that was asked for.
    """
    config = write_model(folder / "model", arguments.model, contender, arguments.layers)
    work = job(folder / "model", config, contender, arguments)
    (folder / "job.json").write_text(json.dumps(work))
    log, out = folder / "vllm.log", folder / "out.json"
    row: dict[str, Any] = {"contender": contender, "model": arguments.model, "layers": arguments.layers}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | ENVIRONMENT
    environment |= CONTENDERS[contender].environment
    start = time.monotonic()
    words, seconds = (str(folder / "job.json"), str(out)), arguments.contender_seconds
    code = run_main(
        "benchmarks.serving.worker", *words, folder=folder, log=log, environment=environment, seconds=seconds
    )
    row["total_seconds"] = time.monotonic() - start
    row["kernels"] = chosen_kernels(log)
    if code != 0 or not out.exists():
        return row | {"error": f"vLLM ended with {code}: ...{log.read_text(errors='replace')[-SHOWN_LOG:]}"}
    if arguments.alike_routes and torch.cuda.is_available():  # on CPUs vLLM selects experts elsewhere
        require_table(log, "leave out --alike-routes")
    return row | json.loads(out.read_text())


def chosen_kernels(log: Path) -> list[str]:
    """Return the lines of vLLM's log that say which kernels it chose."""
    return sorted(set(KERNEL_LINES.findall(log.read_text(encoding="utf-8", errors="replace"))))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all contenders; the record is written after each."""
    record: dict[str, Any] = {
        "benchmark": "serve",
        "model": arguments.model,
        "layers": arguments.layers,
        "routes": "table" if arguments.alike_routes else "own",
        "batches": arguments.batches,
        "prefill": arguments.prefill,
        "rows": [],
        "skipped": [],
    }
    deadline = time.monotonic() + arguments.seconds
    for contender in arguments.contenders:
        if time.monotonic() > deadline:
            record["skipped"].append(contender)
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = measure(contender, arguments, Path(folder))
        record["rows"].append(row)
        write_json(arguments.output, record)
        print(f"{contender}: {row['total_seconds']:.0f} s{', FAILED' if 'error' in row else ''}", flush=True)
    return record


def format_report(record: Mapping[str, Any]) -> str:
    """Return the table: milliseconds of a decoding step by batch, throughput, memory of the weights."""
    good = [row for row in record["rows"] if "error" not in row]
    device = good[0]["environment"] if good else {"device": "?", "torch": "?", "vllm": "?"}
    title = (
        f"Decoding in vLLM {device['vllm']} on {device['device']} (torch {device['torch']}): shapes of "
        f"{record['model']} with {record['layers']} layers, dummy weights. Milliseconds a step."
    )
    header = ["contender", *(f"batch {batch}" for batch in record["batches"])]
    header += [f"{tokens} tokens read (kernels)" for tokens in record["prefill"]] + ["output tokens/s", "weights, GiB"]
    lines = [
        [
            row["contender"],
            *(f"{row['decode'][str(batch)]['milliseconds']:.2f}" for batch in record["batches"]),
            *(
                "{milliseconds:.1f} ({operations_milliseconds:.1f})".format(**row["prefill"][str(tokens)])
                for tokens in record["prefill"]
            ),
            f"{row['throughput']['output_tokens_per_second']:.0f}",
            f"{sum(row['weight_bytes'].values()) / 2**30:.2f} (experts {row['weight_bytes']['experts'] / 2**30:.2f})",
        ]
        for row in good
    ]
    failed = [f"- {row['contender']}: {row['error'][-300:]}" for row in record["rows"] if "error" in row]
    return "\n\n".join([title, markdown_table(header, lines), *(["Failed:", "\n".join(failed)] if failed else [])])


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main(words: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for; write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--model", choices=list(MODELS), default="mixtral")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--contenders", default="milo,int4-g128", help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--batches", type=_numbers, default=[1, 16, 32, 64])
    parser.add_argument("--profile", type=_numbers, default=[], help="batches whose kernels' times are recorded too")
    parser.add_argument("--prefill", type=_numbers, default=[], help="tokens of steps that only read prompts")
    parser.add_argument("--alike-routes", action="store_true", help="routers choose by a table, not by dummy weights")
    parser.add_argument("--prompts", type=int, default=256, help="of the throughput run, 128 tokens in, 128 out")
    parser.add_argument("--seconds", type=float, default=420, help="start no contender after this long")
    parser.add_argument("--contender-seconds", type=float, default=280, help="stop a contender after this long")
    parser.add_argument("--eager", action="store_true", help="neither torch.compile nor CUDA graphs")
    arguments = parser.parse_args(words)
    arguments.contenders = arguments.contenders.split(",")
    unknown = [name for name in arguments.contenders if name not in CONTENDERS]
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}: choose from {', '.join(CONTENDERS)}")
    if uneven := [tokens for tokens in arguments.prefill if tokens < PREFILL_PROMPT or tokens % PREFILL_PROMPT]:
        parser.error(f"--prefill {uneven[0]}: prompts have {PREFILL_PROMPT} tokens, so it must be a multiple of that")
    text = format_report(run(arguments))
    arguments.output.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
