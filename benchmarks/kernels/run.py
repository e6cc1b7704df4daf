"""The run shared by the kernel benchmarks: every shape, contender and token count once, into one record.

A benchmark gives builders; a built :class:`Subject` holds one contender's weights for one shape and makes a
:class:`Point` of any token count. A contender that fails is recorded with its error; the others go on.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.kernels.report import format_report, plot
from benchmarks.kernels.timing import Ceilings, measure_ceilings, roof
from benchmarks.records import environment, write_json
from vllm_milo.kernels.tuning.timing import Budget, error_text, time_calls

DTYPE = torch.bfloat16
MAX_ERROR = 0.02
"""Largest relative error of our bf16 layers against float32; rounding alone gives about 0.004."""


class Point(NamedTuple):
    """What is timed at one token count.

    Attributes:
        calls: the calls of one graph.
        bytes: moved by one call: the weights that it reads, its input and its output.
        flops: of one call.
        expected: the first call's output in float32; None where there is no such check.
        about: further fields of the row.
    """

    calls: Sequence[Callable[[], torch.Tensor]]
    bytes: float
    flops: float
    expected: Callable[[], torch.Tensor] | None
    about: dict[str, Any]


class Subject(NamedTuple):
    """One contender's weights for one shape; ``about`` are fields of all its rows (``bits_per_weight`` among them)."""

    about: dict[str, Any]
    point: Callable[[int], Point]


Builder = Callable[[str, str, argparse.Namespace], Subject]
"""(shape, contender, arguments) -> its subject."""


def measure_point(point: Point, ceilings: Ceilings, seconds: float, device: torch.device) -> dict[str, Any]:
    """Time one point and return its row.

    Raises:
        ValueError: the output is not what it should be.
    """
    timing, outputs = time_calls(point.calls, device, seconds)
    error = None
    if point.expected is not None:
        expected = point.expected()
        error = relative_error(outputs[0], expected)
        if not error < MAX_ERROR:
            raise ValueError(f"relative error {error:.3g} against float32, above {MAX_ERROR}")
    floor = roof(point.bytes, point.flops, ceilings)
    return {
        "microseconds": timing.median * 1e6,
        "minimum_microseconds": timing.minimum * 1e6,
        "replays": timing.replays,
        "calls": len(point.calls),
        "bytes": point.bytes,
        "flops": point.flops,
        "roof_microseconds": floor.seconds * 1e6,
        "bound": floor.bound,
        "roof_fraction": floor.seconds / timing.median,
        "relative_error": error,
        **point.about,
    }


class Run:
    """One benchmark run and its record.

    Args:
        benchmark: its name.
        arguments: from :func:`parse`.
        build: makes the subjects.
    """

    def __init__(self, benchmark: str, arguments: argparse.Namespace, build: Builder) -> None:
        self.arguments = arguments
        self.build = build
        self.budget = Budget(arguments.seconds)
        self.ceilings = measure_ceilings(arguments.device)
        _free(arguments.device)
        self.record: dict[str, Any] = {
            "benchmark": benchmark,
            "environment": environment(arguments.device),
            "ceilings": self.ceilings._asdict(),
            "settings": {"dtype": str(DTYPE), "rank": arguments.rank},
            "rows": [],
            "errors": [],
            "skipped": [],
        }

    def measure(self) -> dict[str, Any]:
        """Measure everything; the record is written after every contender."""
        for shape in self.arguments.shapes:
            for contender in self.arguments.contenders:
                self._measure_contender(shape, contender)
                _free(self.arguments.device)
                write_json(self.arguments.output, self.record)
        return self.record

    def _measure_contender(self, shape: str, contender: str) -> None:
        where: dict[str, Any] = {"shape": shape, "contender": contender}
        if self.budget.spent():
            self.record["skipped"].append(where)
            return
        torch.manual_seed(0)
        try:
            subject = self.build(shape, contender, self.arguments)
        except Exception as error:  # a peer that fails must not stop the others; record and table say so
            self.record["errors"].append(where | {"error": error_text(error)})
            return
        for tokens in self.arguments.tokens:
            here = where | {"tokens": tokens}
            if self.budget.spent():
                self.record["skipped"].append(here)
                continue
            torch.manual_seed(tokens)  # the same inputs and routings for every contender
            try:
                row = measure_point(
                    subject.point(tokens), self.ceilings, self.arguments.point_seconds, self.arguments.device
                )
            except Exception as error:
                self.record["errors"].append(here | {"error": error_text(error)})
            else:
                self.record["rows"].append(here | subject.about | row)
                print(f"{shape} {contender} {tokens}: {row['microseconds']:.1f} us", flush=True)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def parser(description: str | None, shapes: Mapping[str, Any], contenders: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser of the options that all kernel benchmarks have."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("-o", "--output", type=Path, required=True, help="JSON; table and plot are written beside it")
    result.add_argument("--shapes", type=names(shapes), help=f"of {', '.join(shapes)}")
    result.add_argument("--tokens", type=numbers, default=[1, 4, 16, 64, 256, 1024, 4096])
    result.add_argument("--contenders", type=names(contenders), help=f"of {', '.join(contenders)}")
    result.add_argument("--seconds", type=float, default=400, help="start nothing new after this long")
    result.add_argument("--point-seconds", type=float, default=0.15, help="measuring time of one number")
    result.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    return result


def point_parser(
    description: str | None, option: str, known: Mapping[str, Any], seconds: float
) -> argparse.ArgumentParser:
    """Return a parser of what the benchmarks of few tokens' tiles have: ``option`` names some of what is known.

    Args:
        description: of the benchmark.
        option: as on the command line.
        known: its choices; all but ``tiny`` are the default.
        seconds: default of the measuring time of one number.
    """
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("-o", "--output", type=Path, required=True)
    usual = [name for name in known if name != "tiny"]
    result.add_argument(option, type=names(known), default=usual, help=f"of {', '.join(known)}")
    result.add_argument("--tokens", type=numbers, default=[1, 4, 8, 16, 32])
    result.add_argument("--seconds", type=float, default=seconds, help="of one number")
    return result


def record_rows(benchmark: str, output: Path, device: torch.device, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the record of rows, which is written once more after each."""
    record: dict[str, Any] = {"benchmark": benchmark, "environment": environment(device), "rows": []}
    for row in rows:
        record["rows"].append(row)
        write_json(output, record)
    return record


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over that of what is expected, both in float32."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def numbers(text: str) -> list[int]:
    """Read numbers that commas part."""
    return [int(number) for number in text.split(",")]


def names(known: Mapping[str, Any] | Sequence[str]) -> Callable[[str], list[str]]:
    """Return what reads names that commas part, of those that are known."""

    def read(text: str) -> list[str]:
        given = text.split(",")
        unknown = [name for name in given if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}: choose from {', '.join(known)}")
        return given

    return read


def main(benchmark: str, arguments: argparse.Namespace, build: Builder) -> None:
    """Measure, then write JSON, Markdown and PNG."""
    record = Run(benchmark, arguments, build).measure()
    text = format_report(record)
    arguments.output.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)
    print(plot(record, arguments.output.with_suffix(".png")))
