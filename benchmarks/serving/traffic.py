"""Time per output token and to the first token over HTTP: servers side by side on one device, measured in turns.

    python -m benchmarks.serving.traffic -o out/traffic.json    # Mixtral-8x7B's shapes at full depth
    python -m benchmarks.serving.traffic -o out/traffic.json --model qwen3 --layers 48 --concurrency 1 16 64
        [--contenders milo int4-g128] [--loads 128:128 1024:256:64 1024:2:64] [--turns 3] [--kv-gib 20]
        [--serve "--max-cudagraph-capture-size 1024"]

Starts vLLM's OpenAI server for each contender with dummy weights, all of them on the same device, then lets vLLM's own
``vllm bench serve`` ask each in turn: random prompts of so many tokens, exactly so many tokens of answer, so many
requests at once (of a load INPUT:OUTPUT:MOST at most MOST; 1024:2 is there for times to the first token). Servers have
torch.compile and CUDA graphs as users get them, and the same routes by a table (``--own-routes``: by each contender's
dummy weights, which prefer few experts or many); prefixes are not cached. A server that is not asked waits and takes
nothing but memory. Each figure is the median over the turns of a turn's median, with the least and the largest turn.
Answers of dummy weights mean nothing, but they must be of the length that was asked for.

The client reads pieces of answers when it runs: where other processes keep it from running, as on a machine of few
cores, several are there at once, and the time between them is nothing. Each turn records how long it was kept from it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import ROOT
from benchmarks.records import environment, markdown_table, write_json
from benchmarks.serving.contenders import CONTENDERS, write_model
from benchmarks.serving.decode import ENVIRONMENT, chosen_kernels
from benchmarks.serving.dummy.routing import require_table
from benchmarks.serving.models import MODELS, kv_bytes
from benchmarks.serving.server import serve
from benchmarks.serving.word_tokenizer import write_tokenizer

FIGURES = {"tpot": "median_tpot_ms", "ttft": "median_ttft_ms", "tokens_per_second": "output_throughput"}
"""What is kept of a turn, by ``vllm bench serve``'s names: milliseconds, milliseconds, output tokens a second."""
SHORT_ANSWER = 4
"""Most tokens of an answer that is asked for the sake of its first token."""
STALLED, BEAT, MOST_STALLED = "stalled_ms", 0.005, 50.0
"""A turn's longest time in which the client did not run, in milliseconds; seconds between two looks at the clock; and
beyond what the report says that times of pieces are worth little."""
FILLING = {
    "entry_points.txt": "[vllm.general_plugins]\nfilled_dummies = benchmarks.serving.dummy.weights:fill_integers\n",
    "METADATA": "Metadata-Version: 2.1\nName: filled-dummies\nVersion: 0\n",
}
"""A package that has vLLM fill packed dummy weights in each of its processes; see :mod:`.dummy.weights`."""
ROUTING = "alike_routes = benchmarks.serving.dummy.routing:route_alike\n"
"""A further entry point of it, for the same routes for all; see :mod:`.dummy.routing`."""


class Load(NamedTuple):
    """Tokens of each prompt and of each answer, and with how many requests at once it is asked at most; 0 for any."""

    input: int
    output: int
    most: int = 0

    @classmethod
    def parse(cls, text: str) -> Load:
        """Read INPUT:OUTPUT or INPUT:OUTPUT:MOST."""
        return cls(*map(int, text.split(":")))

    def concurrency(self, wanted: Sequence[int]) -> list[int]:
        """Return how many requests at once it is asked with."""
        return [number for number in wanted if not self.most or number <= self.most]


FIRST = Load(1024, 2, 64)
"""Asks for little but first tokens."""


def requests_of(load: Load, concurrency: int) -> int:
    """Return how many requests a turn has: at least three one after the other, or two rounds of all.

    Of answers that are short, so that first tokens are most of the work, there are more: a median of few of those says
    little, since a client that is kept from running for a moment delays a whole round.
    """
    if load.output <= SHORT_ANSWER:
        return max(16, 6 * concurrency)
    return max(3, 2 * concurrency)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start the servers, measure them in turns, and return the record, which is written after each turn."""
    record: dict[str, Any] = {
        "benchmark": "traffic",
        "model": arguments.model,
        "layers": arguments.layers,
        "routes": "own" if arguments.own_routes else "table",
        "serve": arguments.serve,
        "environment": environment(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "turns": [],
    }
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        urls = start(arguments, Path(name), stack)
        record["start_seconds"], record["kernels"] = urls.pop("seconds"), urls.pop("kernels")
        for turn in range(arguments.turns):
            for load in arguments.loads:
                for concurrency in load.concurrency(arguments.concurrency):
                    for contender, url in urls.items():
                        row = {
                            "contender": contender,
                            "turn": turn,
                            "load": [load.input, load.output],
                            "concurrency": concurrency,
                        }
                        row |= ask(url, Path(name) / contender, load, concurrency)
                        record["turns"].append(row)
                        write_json(arguments.output, record)
                        print(json.dumps(row), flush=True)
    return record


def start(arguments: argparse.Namespace, folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Start all servers at once; return their URLs by contender, ``seconds`` that each took, and its ``kernels``."""
    package = folder / "site" / "filled_dummies-0.dist-info"
    package.mkdir(parents=True)
    for file, text in FILLING.items():
        more = ROUTING if file == "entry_points.txt" and not arguments.own_routes else ""
        (package / file).write_text(text + more, encoding="utf-8")
    with ThreadPoolExecutor(len(arguments.contenders)) as pool:
        opened = [pool.submit(start_one, name, arguments, folder) for name in arguments.contenders]
        found: dict[str, Any] = {"seconds": {}, "kernels": {}}
        for name, future in zip(arguments.contenders, opened, strict=True):
            server, url, seconds = future.result()
            stack.push(server.__exit__)
            found[name], found["seconds"][name] = url, seconds
            found["kernels"][name] = chosen_kernels(folder / f"{name}.log")
            if not arguments.own_routes and torch.cuda.is_available():  # on CPUs vLLM selects experts elsewhere
                require_table(folder / f"{name}.log", "--own-routes")
            print(f"{name}: answers after {seconds:.0f} s", flush=True)
    return found


def start_one(contender: str, arguments: argparse.Namespace, folder: Path) -> tuple[Any, str, float]:
    """Start one server; return what ends it, its URL, and the seconds until it answered."""
    model = folder / contender
    config = write_model(model, arguments.model, contender, arguments.layers)
    write_tokenizer(model, config["vocab_size"])
    sequences, longest = max(arguments.concurrency), max(load.input + load.output for load in arguments.loads)
    needed = int(1.05 * kv_bytes(config, sequences * (longest + 32))) + 2**26
    cache = min(needed, int(arguments.kv_gib * 2**30))
    options = ["--load-format", "dummy", "--dtype", "bfloat16", "--max-model-len", str(longest + 32)]
    options += ["--max-num-seqs", str(sequences), "--no-enable-prefix-caching", "--kv-cache-memory-bytes", str(cache)]
    options += ["--gpu-memory-utilization", f"{0.9 / len(arguments.contenders):.2f}"]
    backend = CONTENDERS[contender].moe_backend
    options += [] if backend == "auto" else ["--moe-backend", backend]
    options += ["--enforce-eager"] if arguments.eager else []
    options += arguments.serve
    path = os.pathsep.join([str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
    variables = {**ENVIRONMENT, "PYTHONPATH": path, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    variables |= CONTENDERS[contender].environment
    begun = time.monotonic()
    server = serve(
        model, *options, log=folder / f"{contender}.log", timeout=arguments.start_seconds, environment=variables
    )
    return server, server.__enter__(), time.monotonic() - begun


def ask(url: str, model: Path, load: Load, concurrency: int) -> dict[str, float]:
    """Let ``vllm bench serve`` measure a server once.

    Raises:
        RuntimeError: it failed, or an answer was not of the length that was asked for.
    """
    wanted = requests_of(load, concurrency)
    words = ["--backend", "openai", "--base-url", url, "--model", str(model), "--served-model-name", "milo"]
    words += ["--dataset-name", "random", "--random-input-len", str(load.input)]
    words += ["--random-output-len", str(load.output), "--num-prompts", str(wanted)]
    words += ["--max-concurrency", str(concurrency), "--ignore-eos", "--temperature", "0", "--num-warmups", "2"]
    # an answer of special tokens alone would come as one piece of text, at its end
    words += ["--extra-body", '{"skip_special_tokens": false}', "--disable-tqdm", "--save-detailed"]
    with watched() as stalled:
        result = bench_serve(words)
    if result["completed"] != wanted or result["total_output_tokens"] != wanted * load.output:
        errors = Counter(error.strip() for error in result.get("errors", ()) if error)
        first = f"; the most frequent error: {errors.most_common(1)[0][0]}" if errors else ""
        raise RuntimeError(
            f"{model.name}: {result['completed']} of {wanted} answers, {result['total_output_tokens']} tokens{first}"
        )
    return {figure: result[name] for figure, name in FIGURES.items()} | {STALLED: 1000 * max(stalled)}


@contextlib.contextmanager
def watched() -> Iterator[list[float]]:
    """Note how late a thread of this process gets to run that sleeps :data:`BEAT` again and again, in seconds."""
    late, ended = [0.0], threading.Event()

    def beat() -> None:
        last = time.monotonic()
        while not ended.wait(BEAT):
            now = time.monotonic()
            late.append(now - last - BEAT)
            last = now

    thread = threading.Thread(target=beat, name="watch", daemon=True)
    thread.start()
    try:
        yield late
    finally:
        ended.set()
        thread.join()


def bench_serve(words: Sequence[str]) -> dict[str, Any]:
    """Return what ``vllm bench serve`` measures with the words of a command line; what it prints is kept back.

    It runs in this process: its start takes longer than a short measurement.

    Raises:
        RuntimeError: it ended with an error; the message has the end of what it printed.
    """
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(description="vllm bench serve")
    add_cli_args(parser)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            return main(parser.parse_args(list(words)))
        except (Exception, SystemExit) as error:
            raise RuntimeError(f"vllm bench serve: {error!r}\n{printed.getvalue()[-2000:]}") from error


def summary(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return for each contender, load and concurrency the median, least and largest turn of each figure."""
    cells: dict[tuple[str, int, int, int], list[Mapping[str, float]]] = {}
    for row in record["turns"]:
        cells.setdefault((row["contender"], *row["load"], row["concurrency"]), []).append(row)
    return [
        {"contender": name, "load": [given, asked], "concurrency": concurrency}
        | {
            figure: [statistics.median(row[figure] for row in rows), *_ends(rows, figure)]
            for figure in FIGURES
        }
        for (name, given, asked, concurrency), rows in cells.items()
    ]  # fmt: skip


def _ends(rows: Sequence[Mapping[str, float]], figure: str) -> tuple[float, float]:
    values = [row[figure] for row in rows]
    return min(values), max(values)


def format_report(record: Mapping[str, Any]) -> str:
    """Return the table; each contender's time per output token also as a multiple of the first contender's."""
    rows = summary(record)
    first = rows[0]["contender"]
    base = {(*row["load"], row["concurrency"]): row["tpot"][0] for row in rows if row["contender"] == first}
    lines = [
        [
            f"{row['load'][0]} in, {row['load'][1]} out",
            str(row["concurrency"]),
            row["contender"],
            "{:.2f} ({:.2f} to {:.2f})".format(*row["tpot"]),
            f"{row['tpot'][0] / base[(*row['load'], row['concurrency'])]:.2f}",
            "{:.0f} ({:.0f} to {:.0f})".format(*row["ttft"]),
            f"{row['tokens_per_second'][0]:.0f}",
        ]
        for row in sorted(rows, key=lambda row: (row["load"], row["concurrency"]))
    ]
    header = ["tokens", "requests at once", "contender", "ms a token", f"{first} = 1", "ms to the first", "tokens/s"]
    about = record["environment"]
    title = f"{record['model']}, {record['layers']} layers, dummy weights, vLLM {about['vllm']} on {about['device']}."
    if words := record.get("serve"):
        title += f" All servers with `{' '.join(words)}`."
    stalled = max((row.get(STALLED, 0.0) for row in record["turns"]), default=0.0)
    if stalled > MOST_STALLED:
        title += (
            f" The client was kept from running for up to {stalled:.0f} ms in a turn, its start included: pieces of "
            f"answers may have been read late and at once, which falsifies times of a token and to the first; tokens a "
            f"second hold."
        )
    chosen = [f"- {name}: {'; '.join(kernels)}" for name, kernels in record.get("kernels", {}).items()]
    return "\n\n".join(
        [title, markdown_table(header, lines), *(["Kernels, by the logs:", "\n".join(chosen)] if chosen else [])]
    )


def main(words: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for; write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--model", choices=list(MODELS), default="mixtral")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=["milo", "int4-g128"])
    parser.add_argument("--loads", nargs="+", type=Load.parse, default=[Load(128, 128), Load(1024, 256), FIRST])
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--kv-gib", type=float, default=48.0, help="most memory of a server's KV cache")
    parser.add_argument("--start-seconds", type=float, default=400)
    parser.add_argument("--own-routes", action="store_true", help="routers choose by dummy weights")
    parser.add_argument("--serve", type=str.split, default=[], help="further words of `vllm serve`, in one argument")
    parser.add_argument("--eager", action="store_true", help="neither torch.compile nor CUDA graphs")
    arguments = parser.parse_args(words)
    text = format_report(run(arguments))
    arguments.output.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
