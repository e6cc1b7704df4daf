"""Loads a model in vLLM and takes its prompt log-probabilities; ``run.py`` starts it as a process, with a job file."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.accuracy.at_load.predictions import Predictions
from benchmarks.tensors import tensor_sizes

BATCH = 8
"""Windows whose log-probabilities are held as vLLM returns them."""


def note_load(noted: dict[str, Any]) -> None:
    """Make vLLM's loaders note what a load takes, quantizing included: seconds, and on a GPU the peak of memory.

    Args:
        noted: takes ``load_seconds`` and ``load_peak_bytes``; the latter is None on a CPU.
    """
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    original: Callable[..., torch.nn.Module] = BaseModelLoader.load_model

    def load_model(self: Any, *arguments: Any, **options: Any) -> torch.nn.Module:
        start = time.monotonic()
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        model = original(self, *arguments, **options)
        noted["load_seconds"] = time.monotonic() - start
        noted["load_peak_bytes"] = torch.cuda.max_memory_allocated() if on_gpu else None
        return model

    BaseModelLoader.load_model = load_model  # type: ignore[method-assign]


def predict(llm: Any, windows: list[list[int]], top: int) -> Predictions:
    """Return the predictions of all tokens of windows but the first of each.

    Args:
        llm: vLLM's engine.
        windows: token ids.
        top: number of likeliest tokens.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=top, detokenize=False)
    parts = []
    for start in range(0, len(windows), BATCH):
        batch = windows[start : start + BATCH]
        prompts: list[Any] = [{"prompt_token_ids": window} for window in batch]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        tables = [
            {token: entry.logprob for token, entry in table.items()}
            for output in outputs
            for table in output.prompt_logprobs[1:]
        ]
        parts.append(Predictions.of(tables, [token for window in batch for token in window[1:]], top))
    return Predictions(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def main() -> None:
    """Run the job file named on the command line: ``folder``, ``engine``, ``windows`` (a file), ``top``, ``out``."""
    job = json.loads(Path(sys.argv[1]).read_text())
    noted: dict[str, Any] = {}
    note_load(noted)
    from vllm import LLM

    from benchmarks.records import environment

    start = time.monotonic()
    llm = LLM(model=job["folder"], skip_tokenizer_init=True, **job["engine"])
    noted["start_seconds"] = time.monotonic() - start
    noted["tensors"] = llm.apply_model(tensor_sizes)[0]
    start = time.monotonic()
    predict(llm, load_file(job["windows"])["windows"].tolist(), job["top"]).write(Path(job["out"]) / "predictions")
    noted["predict_seconds"] = time.monotonic() - start
    noted["environment"] = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    (Path(job["out"]) / "noted.json").write_text(json.dumps(noted))


if __name__ == "__main__":
    main()
