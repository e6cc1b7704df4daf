"""A server under load for a long time: are its answers, its memory and its end what they should be?

    python -m benchmarks.serving.soak out/model-milo --minutes 30 -o out/soak.json
    python -m benchmarks.serving.soak out/model-milo --minutes 30 -o out/soak.json -- --max-model-len 4096 -tp 2
    python -m benchmarks.serving.soak out/model-milo --until 1700 -o out/soak.json
    python -m benchmarks.serving.soak model --minutes 3 -o out/16-bits.json
    python -m benchmarks.serving.soak out/model-milo --beside out/16-bits.json -o out/soak.json

What follows ``--`` goes to the server. Prompts of mixed lengths are answered one by one first, greedily. Then come
waves of up to ``--peak`` requests at once, some of whose clients give up or hang up in the middle of a stream, while
the memory of the server's processes and of its devices is sampled. Whole answers are compared with the first ones: sums
are rounded otherwise in batches of another size, which tips near ties, so of each answer that differs, the first token
that does is looked at: a near tie is where the quiet server gave both tokens log-probabilities within ``--near`` nats,
by default a step of bf16 for logits from 16 to 32. How often rounding tips more than that, the model in 16 bits shows
under the same load: with its record, ``--beside``, as large a part and half of it may differ, else none.
At last the quiet server is asked once more, and the process with the most memory, which holds the model, is killed
under load: requests must end in errors, and the server must end, within ``--exit-seconds``. Its status is recorded.

The record, JSON and Markdown, is written after each of these and each minute of the load; ``stage`` says what it has
last, ``minutes`` how long the load lasted so far. Where a machine is leased, ``--until`` ends the load early enough for
what comes after it.

Exit status 1 where something is not as it should be; the record's ``problems`` say what.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoTokenizer

from benchmarks import ROOT
from benchmarks.records import environment
from benchmarks.serving.server import Server, start
from benchmarks.serving.soaking.processes import Sampler, members, process_seconds
from benchmarks.serving.soaking.record import Record
from benchmarks.serving.soaking.report import Stage, format_report, summarize_memory
from benchmarks.serving.soaking.requests import Answer, Request, RequestError, ask, client, run, stream
from benchmarks.serving.soaking.tally import Tally, compare

GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
"""What must be 0 once nobody asks."""
TEXT = ROOT / "tests" / "assets" / "valid.txt"
IN_FLIGHT = 8
"""Requests that wait for their answers when a process is killed."""
WRITE_SECONDS = 60
"""Between two writings of the record during the load."""
MARGIN = 1.5
"""Quiet answers after the load are given so many times the seconds of those before it."""
KILL_SECONDS = 15
"""What the kill is given."""


def make_requests(model: Path, text: Path, longest: int, number: int, seed: int) -> list[Request]:
    """Return requests of mixed lengths, prompts and answers together at most ``longest`` tokens, cut from a text."""
    ids = AutoTokenizer.from_pretrained(model)(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    draw, requests = random.Random(seed), []
    for _ in range(number):
        length = min(int(longest * draw.random() ** 3) + 1, longest - 8, len(ids) - 1)
        place = draw.randrange(len(ids) - length)
        requests.append(Request(ids[place : place + length], min(longest - length, draw.choice((8, 16, 32, 64)))))
    return requests


async def answer_all(url: str, requests: Sequence[Request]) -> list[Answer]:
    """Return the answers of a server that has nothing else to do, one after the other."""
    async with client(url) as http:
        return [await ask(http, request) for request in requests]


def gauges(url: str) -> dict[str, float]:
    """Return what the server counts of requests and of its cache, all engines together."""
    found: Counter[str] = Counter()
    for line in httpx.get(f"{url}/metrics", timeout=30).text.splitlines():
        name = line.partition("{")[0]
        if name in GAUGES:
            found[name] += float(line.rpartition(" ")[2])  # type: ignore[assignment]
    return {name: float(found[name]) for name in GAUGES}


def idle_gauges(url: str, seconds: float) -> dict[str, float]:
    """Return the gauges once they are 0, or after some time."""
    deadline = time.monotonic() + seconds
    while any((found := gauges(url)).values()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


async def _until_error(url: str, request: Request, begun: asyncio.Event) -> str:
    """Read a stream; return how it ended."""
    try:
        async with client(url) as http:
            async for _ in stream(http, request):
                begun.set()
    except (RequestError, httpx.HTTPError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        begun.set()
    return ""


async def kill_under_load(server: Server, request: Request, seconds: float) -> dict[str, Any]:
    """Kill the process that holds the model while requests wait; return how they and the server ended.

    Args:
        server: that runs.
        request: with a long answer.
        seconds: in which all must have ended.
    """
    begun = [asyncio.Event() for _ in range(IN_FLIGHT)]
    waiting = [asyncio.create_task(_until_error(server.url, request, event)) for event in begun]
    await asyncio.gather(*(event.wait() for event in begun))
    others = {pid: held for pid, held in members(server.process.pid).items() if pid != server.process.pid}
    victim = max(others, key=lambda pid: others[pid])
    start_of_end = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    done, hanging = await asyncio.wait(waiting, timeout=seconds)
    for task in hanging:
        task.cancel()
    ends = [task.result() for task in done]
    left = max(0.1, seconds - (time.monotonic() - start_of_end))
    try:
        status = await asyncio.to_thread(server.process.wait, left)
    except subprocess.TimeoutExpired:
        status = None
    return {
        "requests": IN_FLIGHT,
        "errors": sum(bool(end) for end in ends),
        "answered": sum(not end for end in ends),
        "hanging": len(hanging),
        "error": next(filter(None, ends), None),
        "status": status,
        "seconds": time.monotonic() - start_of_end,
    }


def load_seconds(minutes: float, until: float | None, gone: float, quiet: float) -> float:
    """Return how long the load may last.

    Args:
        minutes: at most.
        until: seconds after which all must be over; None for any number.
        gone: seconds of them that are over.
        quiet: seconds that the quiet answers took.
    """
    left = float("inf") if until is None else until - gone - MARGIN * quiet - KILL_SECONDS
    return max(0.0, min(60 * minutes, left))


async def watch(load: Coroutine[Any, Any, None], tally: Tally, sampler: Sampler, record: Record) -> None:
    """Wait for a load whose requests are counted by ``tally``; write what is known each minute and at its end."""
    begun = time.monotonic()

    def write(stage: Stage) -> None:
        minutes, memory = (time.monotonic() - begun) / 60, summarize_memory(tuple(sampler.samples))
        record.write(stage, minutes=minutes, memory=memory, **tally.summary())

    with sampler:
        task = asyncio.create_task(load)
        while (await asyncio.wait([task], timeout=WRITE_SECONDS))[1]:
            write(Stage.PART)
        await task  # raises what it raised
        write(Stage.LOAD)


def soak(server: Server, requests: Sequence[Request], arguments: argparse.Namespace, record: Record) -> None:
    """Ask, load, ask again and kill a server that runs; write the record after each."""
    begun = time.monotonic()
    quiet = asyncio.run(answer_all(server.url, requests))
    took = time.monotonic() - begun
    record.write(Stage.QUIET, quiet={"answers": len(quiet), "seconds": took})
    seconds = load_seconds(arguments.minutes, arguments.until, process_seconds(), took)
    tally = Tally(quiet, arguments.near)
    load = run(server.url, requests, seconds, arguments.peak, arguments.seed, tally.add)
    asyncio.run(watch(load, tally, Sampler(server.process.pid, arguments.sample_seconds), record))
    record.write(Stage.IDLE, left=idle_gauges(server.url, arguments.exit_seconds))
    again = asyncio.run(answer_all(server.url, requests))
    record.write(Stage.AFTER, after=compare(quiet, enumerate(again), arguments.near))
    longest = Request(requests[0].prompt[:8], arguments.longest - 8)
    record.write(Stage.KILL, kill=asyncio.run(kill_under_load(server, longest, arguments.exit_seconds)))


def load_beside(path: Path, near: float) -> dict[str, Any]:
    """Return what the record of another soak says of answers under load.

    Raises:
        SystemExit: the file is no such record, or has near ties of another size.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["benchmark"] != "soak":
            raise ValueError(f"it is one of {record['benchmark']}")
        if record["near"] != near:
            raise ValueError(f"its near ties are of {record['near']} nats, not {near}")
        return {"model": record["model"], "minutes": record["minutes"], **record["load"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"--beside {path}: no record of a soak that can be compared: {error!r}") from error


def main(words: Sequence[str] | None = None) -> int:
    """Run the soak that the command line asks for; write JSON and Markdown as it goes; return the exit status."""
    given = list(sys.argv[1:] if words is None else words)
    place = given.index("--") if "--" in given else len(given)
    arguments = _parser().parse_args(given[:place])
    beside = None if arguments.beside is None else load_beside(arguments.beside, arguments.near)
    requests = make_requests(arguments.model, arguments.text, arguments.longest, arguments.prompts, arguments.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = {
        "benchmark": "soak",
        "model": arguments.model.name,
        "minutes": 0.0,
        "most_minutes": arguments.minutes,
        "until": arguments.until,
        "peak": arguments.peak,
        "near": arguments.near,
        "beside": beside,
        "largest_growth": {"host": arguments.growth, "device": arguments.device_growth},
        "server_arguments": given[place + 1 :],
        "environment": environment(device),
    }
    record = Record(arguments.output, known)
    with tempfile.TemporaryDirectory() as folder:
        log = arguments.log or Path(folder) / "server.log"
        size = ["--max-model-len", str(arguments.longest)]
        with start(arguments.model.resolve(), *size, *given[place + 1 :], log=log, timeout=900) as server:
            soak(server, requests, arguments, record)
    print(format_report(record.found))
    return 1 if record.found["problems"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the checkpoint")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30, help="of load, at most")
    parser.add_argument("--until", type=float, help="seconds, from the start of this process, in which all is over")
    parser.add_argument("--peak", type=int, default=512, help="most requests at once")
    parser.add_argument("--prompts", type=int, default=64, help="different ones")
    parser.add_argument("--text", type=Path, default=TEXT, help="UTF-8 text that prompts are cut from")
    parser.add_argument(
        "--longest", type=int, default=2048, help="tokens of a prompt and its answer; the server's limit"
    )
    parser.add_argument("--near", type=float, default=0.125, help="nats between two tokens that rounding may tip")
    parser.add_argument("--beside", type=Path, help="record of the model in 16 bits, of the same --near")
    parser.add_argument("--growth", type=float, default=0.1, help="part of its memory that the host's may grow by")
    parser.add_argument("--device-growth", type=float, default=0.01, help="part that the devices' may grow by")
    parser.add_argument("--sample-seconds", type=float, default=5)
    parser.add_argument("--exit-seconds", type=float, default=120, help="in which a server with a killed process ends")
    parser.add_argument("--log", type=Path, help="file that takes the server's output")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
