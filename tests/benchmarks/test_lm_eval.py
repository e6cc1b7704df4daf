"""lm-evaluation-harness runs a MiLo checkpoint as docs/serving.md shows, on a task of local files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from readme import ROOT
from tiny_models import TEXT, logprobs
from transformers import AutoTokenizer
from vllm_runner import ENVIRONMENT

from benchmarks.serving.server import serve
from vllm_milo.offline.cli import main as milo
from vllm_milo.offline.evaluation.model import load_model

pytestmark = [pytest.mark.slow, pytest.mark.vllm]
LAUNCHER = ROOT / "benchmarks" / "accuracy" / "lm_eval_cpu.py"
DOCS = ROOT / "docs" / "serving.md"
ITEMS = 8
Way = Callable[[Path, Path], tuple[dict[str, Any], list[dict[str, Any]]]]
"""Scores a checkpoint in a folder that holds the task."""

TASK = """\
task: milo_continuation
dataset_path: json
dataset_kwargs:
  data_files:
    test: {items}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def write_task(folder: Path) -> None:
    """A task of two choices: how a paragraph goes on, and how another one does; all parts begin and end at words."""
    paragraphs = [line for line in TEXT.read_text(encoding="utf-8").splitlines() if len(line) > 300][: 2 * ITEMS]
    rows = []
    for index, (true, other) in enumerate(zip(paragraphs[:ITEMS], paragraphs[ITEMS:], strict=True)):
        words, others = true.split(), other.split()
        choices = [" " + " ".join(others[15:25])] * 2
        choices[index % 2] = " " + " ".join(words[15:25])
        rows.append({"prompt": " ".join(words[:15]), "choices": choices, "answer": index % 2})
    items = folder / "items.jsonl"
    items.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    (folder / "task.yaml").write_text(TASK.format(items=items), encoding="utf-8")


def run_harness(command: list[str], options: str, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the task's results and its samples."""
    command = [*command, "--model_args", options, "--tasks", "milo_continuation", "--include_path", str(folder)]
    command += ["--output_path", str(folder / "out"), "--log_samples"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | ENVIRONMENT
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
    (results,) = (folder / "out").glob("*/results_*.json")
    (samples,) = (folder / "out").glob("*/samples_*.jsonl")
    table = json.loads(results.read_text(encoding="utf-8"))["results"]["milo_continuation"]
    return table, [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]


def by_vllm(checkpoint: Path, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    options = f"pretrained={checkpoint},quantization=milo,max_model_len=512,enforce_eager=True,dtype=float32"
    return run_harness([sys.executable, str(LAUNCHER), "--model", "vllm"], options, folder)


def by_transformers(checkpoint: Path, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """As the documentation writes it."""
    found = re.search(r'python (-c) "(import vllm_milo; [^"]+)" (--model hf)', DOCS.read_text(encoding="utf-8"))
    assert found is not None
    command = [sys.executable, found[1], found[2], *found[3].split(), "--device", "cpu"]
    return run_harness(command, f"pretrained={checkpoint},dtype=float32", folder)


def by_server(checkpoint: Path, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """By the harness's own command, which need not know MiLo, from a server."""
    pytest.importorskip("tenacity", reason="pip install 'lm_eval[api]'")
    words = ["--quantization", "milo", "--max-model-len", "512", "--enforce-eager", "--dtype", "float32"]
    with serve(checkpoint, *words, log=folder / "vllm.log") as url:
        options = f"model=milo,base_url={url}/v1/completions,tokenizer={checkpoint},max_length=512"
        return run_harness([sys.executable, "-m", "lm_eval", "--model", "local-completions"], options, folder)


@pytest.mark.parametrize("score", [by_vllm, by_transformers, by_server])
def test_lm_eval_scores_a_milo_checkpoint_as_its_weights_say(score: Way, tmp_path: Path, bundled_model: Path):
    pytest.importorskip("lm_eval", reason="pip install 'vllm-milo[bench]'")
    checkpoint = tmp_path / "checkpoint"
    arguments = ["quantize", str(bundled_model), "-o", str(checkpoint), "--quiet"]
    assert milo([*arguments, "--method", "paper", "--ranks", "dense=16,sparse=8", "--max-rounds", "1"]) == 0
    write_task(tmp_path)
    table, samples = score(checkpoint, tmp_path)
    assert len(samples) == ITEMS
    model, tokenizer = load_model(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    right = 0
    for sample in samples:
        item = sample["doc"]
        expected = [log_likelihood(model, tokenizer, item["prompt"], choice) for choice in item["choices"]]
        assert [float(found) for ((found, _),) in sample["resps"]] == pytest.approx(expected, abs=0.02)
        right += expected.index(max(expected)) == item["answer"]
    assert table["acc,none"] == right / ITEMS


def log_likelihood(model: Any, tokenizer: Any, prompt: str, continuation: str) -> float:
    """The sum of log-probabilities of a continuation's tokens, by transformers on the dequantized weights."""
    start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    ids = tokenizer(prompt + continuation, add_special_tokens=False)["input_ids"]
    table = logprobs(model, ids)
    return float(table[torch.arange(start - 1, len(ids) - 1), torch.tensor(ids[start:])].sum())
