"""Measures one model in one start of vLLM; ``decode.py`` starts it as a process, with a job file and one to write."""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.serving.dummy.routing import route_alike
from benchmarks.serving.dummy.weights import fill_integers
from benchmarks.tensors import tensor_sizes

PROMPT_TOKENS = 32
SHORT, LONG = 8, 72
"""Two output lengths; what they differ in is decoding alone."""
REPEATS = 3
PROFILED_KERNELS = 25
"""So many of the kernels that take longest are recorded of a profiled batch."""
PREFILL_PROMPT = 256
"""Tokens of each prompt of a step that only reads prompts."""


def stored_bytes(model: torch.nn.Module) -> dict[str, int]:
    """Return the bytes of a model's tensors: experts, attention, shared experts, and the rest."""
    total = {"experts": 0, "attention": 0, "shared": 0, "rest": 0}
    for name, (size, _) in tensor_sizes(model).items():
        words = name.split(".")
        shared = any(word.startswith("shared_expert") for word in words)
        attention = "self_attn" in words and not any("rotary" in word for word in words)
        kind = "experts" if "experts" in words else "attention" if attention else "rest"
        total["shared" if shared else kind] += size
    return total


def operations(run: Callable[[], Any], steps: int) -> list[dict[str, Any]]:
    """Return what ``run`` does on the device, else on the CPU: calls and microseconds a step, the longest first."""
    on_gpu = torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        run()

    def microseconds(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total) / steps

    return [
        {"name": event.key, "calls": event.count / steps, "microseconds": microseconds(event)}
        for event in sorted(profiler.key_averages(), key=microseconds, reverse=True)
    ]


class Worker:
    """One started engine.

    Args:
        job: ``folder``, ``engine`` (arguments of ``LLM``), ``vocab``, ``batches``, ``throughput``
            (``prompts``, ``input``, ``output``), ``profile`` (batches whose kernels are recorded), ``prefill``
            (tokens of steps that only read prompts), ``alike_routes`` (routers choose by a table).
    """

    def __init__(self, job: dict[str, Any]) -> None:
        from vllm import LLM

        self.job = job
        self.random = random.Random(0)
        start = time.monotonic()
        self.llm = LLM(
            model=job["folder"], load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", **job["engine"]
        )
        self.start_seconds = time.monotonic() - start

    def measure(self) -> dict[str, Any]:
        """Return everything that is measured."""
        self.check_finite()
        return {
            "start_seconds": self.start_seconds,
            "weight_bytes": self.llm.apply_model(stored_bytes)[0],
            "decode": {str(batch): self.decode(batch) for batch in self.job["batches"]},
            "throughput": self.throughput(**self.job["throughput"]),
            "kernels_by_time": {str(batch): self.profile(batch) for batch in self.job["profile"]},
            "prefill": {str(tokens): self.prefill(tokens) for tokens in self.job["prefill"]},
        }

    def prompts(self, count: int, length: int) -> list[Any]:
        """Return random prompts."""
        vocab = self.job["vocab"]
        return [{"prompt_token_ids": [self.random.randrange(3, vocab) for _ in range(length)]} for _ in range(count)]

    def generate(self, prompts: list[Any], tokens: int, logprobs: int | None = None) -> list[Any]:
        """Generate exactly ``tokens`` tokens for each prompt, greedily."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, logprobs=logprobs
        )
        return self.llm.generate(prompts, sampling, use_tqdm=False)

    def check_finite(self) -> None:
        """Refuse a model whose log-probabilities are not finite.

        Raises:
            ValueError: they are not.
        """
        for output in self.generate(self.prompts(4, PROMPT_TOKENS), 4, logprobs=0):
            answer = output.outputs[0]
            values = [table[token].logprob for table, token in zip(answer.logprobs, answer.token_ids, strict=True)]
            if not all(math.isfinite(value) for value in values):
                raise ValueError(f"log-probabilities are not finite: {values}")

    def seconds(self, batch: int, tokens: int) -> float:
        """Return how long a batch takes with ``tokens`` output tokens."""
        prompts = self.prompts(batch, PROMPT_TOKENS)
        start = time.perf_counter()
        self.generate(prompts, tokens)
        return time.perf_counter() - start

    def decode(self, batch: int) -> dict[str, float]:
        """Return milliseconds of one decoding step: two output lengths subtracted, median of the repeats."""
        self.seconds(batch, SHORT)
        short = [self.seconds(batch, SHORT) for _ in range(REPEATS)]
        long = [self.seconds(batch, LONG) for _ in range(REPEATS)]
        step = (statistics.median(long) - statistics.median(short)) / (LONG - SHORT)
        spread = (max(long) - min(long)) / (LONG - SHORT)
        return {"milliseconds": step * 1e3, "spread_milliseconds": spread * 1e3}

    def profile(self, batch: int) -> list[dict[str, Any]]:
        """Return the operations that take longest, on the device if there is one, in microseconds a decoding step.

        Kernels that start early wait for the one before them, and that counts as theirs: the sum exceeds a step's time.
        """
        return operations(lambda: self.generate(self.prompts(batch, PROMPT_TOKENS), LONG), LONG)[:PROFILED_KERNELS]

    def prefill(self, tokens: int) -> dict[str, Any]:
        """Return milliseconds of a step that reads so many tokens in prompts: by the clock, and of all operations.

        The clock also counts what the engine does for each request. Where it shows more than the operations take
        together, the device has waited for the host.
        """
        prompts = self.prompts(tokens // PREFILL_PROMPT, PREFILL_PROMPT)

        def seconds() -> float:
            start = time.perf_counter()
            self.generate(prompts, 1)
            return time.perf_counter() - start

        seconds()
        found = operations(lambda: self.generate(prompts, 1), 1)
        return {
            "milliseconds": statistics.median(seconds() for _ in range(REPEATS)) * 1e3,
            "operations_milliseconds": sum(one["microseconds"] for one in found) / 1e3,
            "operations": found[:PROFILED_KERNELS],
        }

    def throughput(self, prompts: int, input: int, output: int) -> dict[str, float]:
        """Return output and total tokens a second, all requests handed over at once."""
        requests = self.prompts(prompts, input)
        start = time.perf_counter()
        self.generate(requests, output)
        seconds = time.perf_counter() - start
        return {
            "prompts": prompts,
            "input_tokens": input,
            "output_tokens": output,
            "seconds": seconds,
            "output_tokens_per_second": prompts * output / seconds,
            "tokens_per_second": prompts * (input + output) / seconds,
        }


def main() -> None:
    """Run the job file named on the command line; the environment goes into the result."""
    from benchmarks.records import environment

    job = json.loads(Path(sys.argv[1]).read_text())
    fill_integers()
    if job["alike_routes"]:
        route_alike()
    result = Worker(job).measure()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result["environment"] = environment(device)
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
