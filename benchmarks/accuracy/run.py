"""Scores contenders on one model: perplexity over seeds, stored bits, errors by kind; saves after every row."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import scores
from benchmarks.accuracy.activations import second_moments
from benchmarks.accuracy.contenders import CALIBRATION, COUNTS, GPTQ_ROWS, HQQ, SECTIONS, WINDOWS, Contender, Shape
from benchmarks.accuracy.gptq import quantize_model
from benchmarks.accuracy.pool import Job, QuantizePool
from benchmarks.accuracy.quantized_model import QuantizedModel
from benchmarks.records import device_name
from vllm_milo.offline.checkpoint.inspect import inspect_checkpoint
from vllm_milo.offline.evaluation.expert_use import count_experts_used
from vllm_milo.version import __version__

REFERENCES = ("HQQ", *GPTQ_ROWS)
BUDGETS = (3.5525, 3.6, 3.605, 3.75)
"""Stored bits at which the paper's share of the gap is reported: +1.5 %, 3.6, +3 % over 3.5, and 3.75."""


@dataclass(frozen=True)
class Settings:
    """How to measure; the README of a result.

    Attributes:
        window: tokens of a window; the model's maximum caps it.
        windows: windows of a seed.
        seeds: disjoint sets of windows.
        calibration_windows: windows of the calibration text for GPTQ, expert counts and output errors.
        batch: windows of a forward pass.
        rounds: cap on the rounds of the paper's method.
        device: where models are scored and GPTQ runs.
        quantize_device: where `milo quantize` runs.
        jobs: worker processes of `milo quantize`.
        deadline: ``time.monotonic()`` at which contenders are given up.
    """

    window: int = 512
    windows: int = 128
    seeds: int = 3
    calibration_windows: int = 128
    batch: int = 16
    rounds: int = 20
    device: str = "cpu"
    quantize_device: str = "cpu"
    jobs: int = 1
    deadline: float = float("inf")


@dataclass
class Benchmark:
    """The rows of one model, and what they are measured with.

    Attributes:
        folder: the source model.
        tokens: the text that is scored, int64 [tokens].
        calibration_tokens: another text; nothing of it is scored.
        calibration_text: the same as a file, for `milo quantize --calibration`.
        output: folder of the results.
        settings: see :class:`Settings`.
        record: what goes into results.json before the rows.
    """

    folder: Path
    tokens: torch.Tensor
    calibration_tokens: torch.Tensor
    calibration_text: Path
    output: Path
    settings: Settings
    record: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    _losses: dict[str, torch.Tensor] = field(default_factory=dict)
    _start: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        settings = self.settings
        self.output.mkdir(parents=True, exist_ok=True)
        self.model = QuantizedModel(self.folder, settings.device)
        config = self.model.model.config
        window = min(settings.window, int(config.max_position_embeddings))
        self.windows = scores.choose_windows(self.tokens, window, settings.windows, settings.seeds)
        self.calibration = scores.choose_windows(self.calibration_tokens, window, settings.calibration_windows, 1)[0]
        self.shape = Shape(int(config.hidden_size), list(self.model.matrices.values()))
        self.counts_file = self.output / "expert_counts.json"
        counts = count_experts_used(self.model.model, self.calibration.flatten())
        self.counts_file.write_text(json.dumps({"expert_counts": counts}) + "\n")
        self.moments = second_moments(self.model, self.calibration, settings.batch)
        self.record |= {"windows": list(self.windows.shape), "calibration_windows": list(self.calibration.shape)}
        self.record |= {"vllm_milo": __version__, "torch": torch.__version__, "rounds": settings.rounds}
        self.record["device"] = device_name(settings.device)

    def run(self, sections: Sequence[str], only: str = "", extra: Sequence[Contender] = ()) -> None:
        """Score the contenders of some sections whose names match ``only``, and ``extra`` ones."""
        jobs = list(self._jobs(sections, only, extra))
        with tempfile.TemporaryDirectory() as scratch:
            placed = [
                (section, contender, Job(self.folder, Path(scratch) / str(number), self._arguments(contender)))
                for number, (section, contender) in enumerate(jobs)
            ]
            pairs = [(contender, job) for _, contender, job in placed]
            with QuantizePool(pairs, self.settings.jobs, self.settings.deadline) as pool:
                self._score(sections[0], "bf16", "baseline", 16.0, lambda: None)
                if "main" in sections:
                    self._run_gptq(sections[0], only)
                for (section, _, _), (contender, outcome) in zip(placed, pool, strict=True):
                    row: dict[str, Any] = {"arguments": " ".join(contender.arguments)}
                    if outcome.error is not None:
                        self._add({"section": section, "name": contender.name, "error": outcome.error} | row)
                        continue
                    bits = inspect_checkpoint(outcome.out)["bits_per_weight"]
                    row["seconds"] = round(outcome.seconds, 1)
                    self._score(section, contender.name, contender.group, bits, self._loader(outcome.out), row)
                    shutil.rmtree(outcome.out)
        if "large" in sections and "main" not in sections:  # for information there: last, since time is short
            self._run_gptq(sections[0], only)

    def failures(self) -> list[str]:
        """Return the contenders that could not be measured, with their messages."""
        return [f"{row['name']}: {row['error']}" for row in self.rows if "error" in row]

    def _jobs(self, sections: Sequence[str], only: str, extra: Sequence[Contender]) -> Iterator[tuple[str, Contender]]:
        yield sections[0], HQQ  # what everything is measured against
        for section in sections:
            contenders = SECTIONS[section](self.shape, self.settings.rounds)
            # on narrow models several fractions of the hidden size are the same rank
            for contender in {contender.name: contender for contender in contenders}.values():
                if re.search(only, contender.name):
                    yield section, contender
        for contender in extra:
            yield sections[0], contender

    def _arguments(self, contender: Contender) -> tuple[str, ...]:
        values = {
            COUNTS: str(self.counts_file),
            CALIBRATION: str(self.calibration_text),
            WINDOWS: str(len(self.calibration)),
        }
        filled = tuple(values.get(argument, argument) for argument in contender.arguments)
        return (*filled, "--device", self.settings.quantize_device)

    def _loader(self, checkpoint: Path) -> Callable[[], None]:
        return lambda: self.model.load(checkpoint)

    def _run_gptq(self, section: str, only: str) -> None:
        for name, options in GPTQ_ROWS.items():
            if not re.search(only, name) or time.monotonic() > self.settings.deadline:
                continue
            self.model.restore()
            start = time.monotonic()
            quantize_model(self.model, self.calibration, self.settings.batch, options)
            row = {"seconds": round(time.monotonic() - start, 1), "bits_fp16_zero": 3 + 32 / options.group_size}
            self._score(section, name, "GPTQ", options.bits, lambda: None, row)
        self.model.restore()

    def _score(
        self,
        section: str,
        name: str,
        group: str,
        bits: float,
        load: Callable[[], None],
        more: dict[str, Any] | None = None,
    ) -> None:
        """Load weights, score them, and add the row."""
        load()
        losses = scores.window_losses(self.model.model, self.windows, self.settings.batch)
        found = scores.perplexities(losses)
        errors = self.model.errors(self.moments) if name != "bf16" else {"weight": {}, "output": {}}
        self._losses[name] = losses
        row = {"section": section, "name": name, "group": group, "bits": bits, "perplexity": found}
        row |= {"weight_error": errors["weight"], "output_error": errors["output"], **(more or {})}
        self._add(row)

    def _add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        text = f"failed: {row['error']}" if "error" in row else f"{row['bits']:8.4f}{_mean(row['perplexity']):10.4f}"
        print(f"{row['section']:<11}{row['name']:<36}{text}  after {time.monotonic() - self._start:.0f} s", flush=True)
        self._derive()
        self.save({})

    def contents(self) -> dict[str, Any]:
        """Return what results.json holds."""
        return self.record | {"rows": self.rows}

    def save(self, more: dict[str, Any]) -> None:
        """Write results.json, with ``more`` in its record; the file is whole at any time."""
        self.record |= more
        path = self.output / "results.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(self.contents(), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    def _derive(self) -> None:
        """Fill in what depends on other rows: gap closed, P at the same bits, paired differences."""
        scored = {row["name"]: row for row in self.rows if "perplexity" in row}
        if not {"bf16", "HQQ"} <= scored.keys():
            return
        curves = self._paper_curves(scored)
        for row in scored.values():
            row["gap_closed"] = self._gap(row, scored)
            share = scores.paper_share(curves, row["bits"])
            if share is not None:
                margin = [a - b for a, b in zip(row["gap_closed"], share.by_seed, strict=True)]
                row |= {"paper_share": share.by_seed, "paper_policy": share.policy, "over_paper": margin}
            row["loss_over"] = {
                name: scores.paired_difference(self._losses[row["name"]], self._losses[name])._asdict()
                for name in REFERENCES
                if name in self._losses
            }
        shares = {f"{bits:g}": scores.paper_share(curves, bits) for bits in BUDGETS}
        self.record["paper_share"] = {bits: share._asdict() for bits, share in shares.items() if share is not None}

    def _paper_curves(self, scored: dict[str, dict[str, Any]]) -> dict[str, list[tuple[float, list[float]]]]:
        """Return the paper's curves of the sections that sweep ranks, each from HQQ, its rank 0, on."""
        curves: dict[str, list[tuple[float, list[float]]]] = defaultdict(list)
        for row in scored.values():
            if row["section"] in ("main", "large") and row["group"].startswith("paper"):
                curves[row["group"]].append((row["bits"], self._gap(row, scored)))
        return {name: [(scored["HQQ"]["bits"], [0.0] * len(points[0][1])), *points] for name, points in curves.items()}

    @staticmethod
    def _gap(row: dict[str, Any], scored: dict[str, dict[str, Any]]) -> list[float]:
        return scores.gap_closed(row["perplexity"], scored["HQQ"]["perplexity"], scored["bf16"]["perplexity"])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
