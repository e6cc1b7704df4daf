"""What a soak found so far: what memory did, what is a problem, and the report. Of an unfinished record, what is there.

A record has ``quiet`` from the first, ``requests``, ``load`` and ``memory`` since there was load, ``left`` since the
server was idle, ``after`` since it has answered again, and ``kill`` at the end. ``beside`` is the ``load`` of the model
in 16 bits, where that was given.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from benchmarks.records import markdown_table
from benchmarks.serving.soaking.processes import Sample

HELD = ("host", "device")
"""Whose memory is sampled."""
POINTS = 120
"""Most samples that a record keeps."""
TIMES = 1.5
"""So many times the part of the 16-bit model's answers may differ beyond near ties, which few bits make more often."""


class Stage(StrEnum):
    """What a soak does, in this order; a record names the last that it has."""

    QUIET = "quiet answers"
    PART = "part of the load"
    LOAD = "the whole load"
    IDLE = "gauges of the idle server"
    AFTER = "quiet answers again"
    KILL = "the kill"


def missing_stages(record: Mapping[str, Any]) -> list[Stage]:
    """Return the stages that a record lacks."""
    stages = list(Stage)
    return [stage for stage in stages[stages.index(record["stage"]) + 1 :] if stage is not Stage.PART]


def summarize_memory(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return some of the samples, and of host and device the peak and the growth, in bytes.

    Growth is the median of the last fifth of the samples less that of the second fifth. For the device, only samples
    that tell its memory count.
    """
    summary: dict[str, Any] = {"samples": len(samples), "series": _columns(_thin(samples, POINTS))}
    for name in HELD:
        held = [getattr(sample, name) for sample in samples if getattr(sample, name) is not None]
        if not held:
            continue
        fifth = max(1, len(held) // 5)
        early, late = (int(statistics.median(part)) for part in (held[fifth : 2 * fifth] or held[:1], held[-fifth:]))
        summary[name] = {"early": early, "late": late, "peak": max(held), "growth": late - early}
    return summary


def _thin(samples: Sequence[Sample], most: int) -> Sequence[Sample]:
    """Return at most so many of the samples, evenly, the first and the last among them."""
    if len(samples) <= most:
        return samples
    return [samples[index * (len(samples) - 1) // (most - 1)] for index in range(most)]


def _columns(samples: Sequence[Sample]) -> dict[str, list[float | None]]:
    return {name: [getattr(sample, name) for sample in samples] for name in Sample._fields}


def find_problems(record: Mapping[str, Any]) -> list[str]:
    """Return what is not as it should be, as far as the record goes."""
    problems = _problems_of_answers(record)
    for name, value in record.get("left", {}).items():
        if value:
            problems.append(f"{name} stays at {value:g} when nobody asks")
    for name, part in record["largest_growth"].items():
        held = record.get("memory", {}).get(name)
        if held is not None and held["growth"] > part * held["early"]:
            problems.append(f"the {name}'s memory grew from {held['early']} to {held['late']} bytes")
    return problems + (_problems_of_the_end(record["kill"]) if "kill" in record else [])


def _problems_of_answers(record: Mapping[str, Any]) -> list[str]:
    problems = []
    if "requests" in record and record["requests"]["failed"]:
        problems.append(f"{record['requests']['failed']} requests failed: {record['requests']['errors']}")
    beside = record.get("beside")
    for when, key in (("under load", "load"), ("after it", "after")):
        if key in record and record[key]["other"] > _most_others(record[key]["answers"], beside):
            problems.append(
                f"{record[key]['other']} of {record[key]['answers']} answers {when} differ where there was no near tie "
                f"(gaps up to {record[key]['largest_gap']:.3g} nats)"
            )
            if beside is not None:
                problems[-1] += f"; of the model in 16 bits {beside['other']} of {beside['answers']} under load"
    if "load" in record and not record["load"]["answers"]:
        problems.append("no client got an answer")
    return problems


def _most_others(answers: int, beside: Mapping[str, Any] | None) -> float:
    """Return how many of so many answers may differ where there was no near tie.

    That is none, or :data:`TIMES` the 16-bit model's part, with two standard deviations of what so few answers have.
    """
    if beside is None or not beside["answers"]:
        return 0.0
    part = min(1.0, TIMES * beside["other"] / beside["answers"])
    return answers * part + 2 * (answers * part * (1 - part)) ** 0.5


def _problems_of_the_end(kill: Mapping[str, Any]) -> list[str]:
    problems = []
    if kill["hanging"]:
        problems.append(f"{kill['hanging']} requests got no end after the model's process was killed")
    if not kill["errors"]:
        problems.append("no request ended in an error when the model's process was killed")
    if kill["status"] is None:
        problems.append("the server goes on after the model's process was killed")
    return problems


def find_notes(record: Mapping[str, Any]) -> list[str]:
    """Return what one should know, though it is vLLM's."""
    if "kill" in record and record["kill"]["status"] == 0:
        return [
            "vLLM's server ended with status 0 after the model's process was killed; supervisors must restart it on 0"
        ]
    return []


def format_report(record: Mapping[str, Any]) -> str:
    """Return title, tables and sentences, of an unfinished record those of what is there, and what is missing."""
    missing = missing_stages(record)
    blocks = [f"Soak of {record['model']}, {record['minutes']:.3g} minutes, up to {record['peak']} requests at once."]
    if missing:
        blocks.append(f"Unfinished, the last is: {record['stage']}. Missing: {', '.join(missing)}.")
    blocks += _answers(record)
    blocks += _memory(record["memory"]) if "memory" in record else []
    blocks += _sentences(record)
    blocks.append(f"Problems{' so far' if missing else ''}: " + ("; ".join(record["problems"]) or "none"))
    blocks += [f"Note: {note}" for note in record["notes"]]
    return "\n\n".join(blocks)


def _answers(record: Mapping[str, Any]) -> list[str]:
    """Return the table of answers by how they differ."""
    header = ["answers", "number", "exact", "first difference a near tie", "other", "largest gap, nats"]
    rows = [
        [when, *(_shown(record[key][name]) for name in ("answers", "exact", "near_ties", "other", "largest_gap"))]
        for when, key in (("under load", "load"), ("quiet again", "after"), ("16 bits, under load", "beside"))
        if record.get(key) is not None
    ]
    return [markdown_table(header, rows)] if rows else []


def _memory(memory: Mapping[str, Any]) -> list[str]:
    """Return the table of memory early, late and at most, and the one of its course."""
    held = [name for name in HELD if name in memory]
    names = ("early", "late", "peak", "growth")
    rows = [[name, *(_mebibytes(memory[name][key]) for key in names)] for name in held]
    series = memory["series"]
    places = _quarters(series["seconds"])
    course = [[name, *(_mebibytes(series[name][place]) for place in places)] for name in held]
    header = ["MiB at", *(f"{series['seconds'][place]:.0f} s" for place in places)]
    return [markdown_table(["MiB", *names], rows), markdown_table(header, course)]


def _quarters(seconds: Sequence[float]) -> list[int]:
    """Return the places of what lies nearest to 0, 25, 50, 75 and 100 % of the time, each place once."""
    times = [seconds[-1] * part / 4 for part in range(5)] if seconds else []
    return sorted({min(range(len(seconds)), key=lambda place: abs(seconds[place] - time)) for time in times})


def _sentences(record: Mapping[str, Any]) -> list[str]:
    """Return what there is to say of quiet answers, of requests and of the killed process."""
    sentences = []
    if "quiet" in record:
        sentences.append(f"{record['quiet']['answers']} quiet answers first, in {record['quiet']['seconds']:.1f} s.")
    if "requests" in record:
        counts = record["requests"]
        sentences.append(
            f"{counts['all']} requests, {counts['left_by_clients']} left by their clients, {counts['failed']} failed; "
            f"median {_shown(counts['median_seconds'])} s, longest {_shown(counts['longest_seconds'])} s."
        )
    if "kill" in record:
        kill = record["kill"]
        sentences.append(
            f"Killed: {kill['errors']} of {kill['requests']} requests in errors, {kill['hanging']} hanging, status "
            f"{kill['status']}, {kill['seconds']:.1f} s."
        )
    return sentences


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _mebibytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.0f}"
