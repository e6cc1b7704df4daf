"""What a soak found: whether answers are the quiet server's, what failed, what memory did, and what is a problem."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.records import markdown_table
from benchmarks.serving.soaking.processes import Sample
from benchmarks.serving.soaking.requests import Answer, Outcome


def first_difference(quiet: Answer, loaded: Answer) -> tuple[int, float] | None:
    """Return where two answers differ first, and by how many nats the quiet server preferred its token there.

    That is infinite where the other token was none of its likeliest. None where the answers are the same.
    """
    pairs = zip(quiet.tokens, loaded.tokens, strict=False)
    place = next((index for index, (one, other) in enumerate(pairs) if one != other), None)
    if place is None:
        lengths = len(quiet.tokens), len(loaded.tokens)
        return None if lengths[0] == lengths[1] else (min(lengths), float("inf"))
    top = quiet.likeliest[place]
    own, other = quiet.tokens[place], loaded.tokens[place]
    return place, top[own] - top[other] if other in top else float("inf")


def compare(quiet: Sequence[Answer], answered: Sequence[tuple[int, Answer]], near: float) -> dict[str, Any]:
    """Return how many answers, by the number of their request, are those of the quiet server."""
    found = [first_difference(quiet[index], answer) for index, answer in answered]
    gaps = [gap for difference in found if difference is not None for gap in [difference[1]]]
    ties = sum(gap <= near for gap in gaps)
    return {
        "answers": len(found),
        "exact": len(found) - len(gaps),
        "near_ties": ties,
        "near_tie_share": ties / len(gaps) if gaps else None,
        "other": len(gaps) - ties,
        "largest_gap": min(max(gaps), 1e9) if gaps else None,
    }


def summarize_memory(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return peak and growth: the median of the last fifth of the samples less that of the second fifth, in bytes."""
    fifth = max(1, len(samples) // 5)
    early, late = samples[fifth : 2 * fifth] or samples[:1], samples[-fifth:]
    summary: dict[str, Any] = {"samples": len(samples)}
    for name in Sample._fields:
        if any(getattr(sample, name) is None for sample in samples):
            continue
        middle = [statistics.median(getattr(sample, name) for sample in part) for part in (early, late)]
        peak = max(getattr(sample, name) for sample in samples)
        summary[name] = {
            "early": int(middle[0]),
            "late": int(middle[1]),
            "peak": peak,
            "growth": int(middle[1] - middle[0]),
        }
    return summary


def count(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return how many requests there were, what came of them, and how long answers took, in seconds."""
    errors = [one.error for one in outcomes if one.error is not None]
    seconds = sorted(one.seconds for one in outcomes if one.answer is not None)
    return {
        "all": len(outcomes),
        "by_kind": dict(Counter(one.kind for one in outcomes)),
        "left_by_clients": sum(one.answer is None and one.error is None for one in outcomes),
        "failed": len(errors),
        "errors": dict(Counter(errors).most_common(5)),
        "median_seconds": statistics.median(seconds) if seconds else None,
        "longest_seconds": seconds[-1] if seconds else None,
    }


def find_problems(record: Mapping[str, Any], largest_growth: float) -> list[str]:
    """Return what is not as it should be; ``largest_growth`` is the part of its memory that the host's may grow by."""
    requests, kill = record["requests"], record["kill"]
    problems = [f"{requests['failed']} requests failed: {requests['errors']}"] if requests["failed"] else []
    for when, phase in (("under load", record["load"]), ("after it", record["after"])):
        if phase["other"]:
            problems.append(
                f"{phase['other']} of {phase['answers']} answers {when} differ where there was no near tie (gaps up to "
                f"{phase['largest_gap']:.3g} nats)"
            )
    if not record["load"]["answers"]:
        problems.append("no client got an answer")
    problems += [f"{name} stays at {value:g} when nobody asks" for name, value in record["left"].items() if value]
    host = record["memory"]["host"]
    if host["growth"] > largest_growth * host["early"]:
        problems.append(f"the host's memory grew from {host['early']} to {host['late']} bytes")
    if kill["hanging"]:
        problems.append(f"{kill['hanging']} requests got no end after the model's process was killed")
    if not kill["errors"]:
        problems.append("no request ended in an error when the model's process was killed")
    if kill["status"] is None:
        problems.append("the server goes on after the model's process was killed")
    return problems


def find_notes(record: Mapping[str, Any]) -> list[str]:
    """Return what one should know, though it is vLLM's."""
    if record["kill"]["status"] == 0:
        return [
            "vLLM's server ended with status 0 after the model's process was killed; supervisors must restart it on 0"
        ]
    return []


def format_report(record: Mapping[str, Any]) -> str:
    """Return the tables."""
    title = f"Soak of {record['model']}, {record['minutes']:g} minutes, up to {record['peak']} requests at once."
    header = ["answers", "number", "exact", "first difference a near tie", "other", "largest gap, nats"]
    rows = [
        [when, *(_shown(record[key][name]) for name in ("answers", "exact", "near_ties", "other", "largest_gap"))]
        for when, key in (("under load", "load"), ("quiet again", "after"))
    ]
    memory = [
        [name, *(f"{found[key] / 2**20:.0f}" for key in ("early", "late", "peak", "growth"))]
        for name, found in record["memory"].items()
        if isinstance(found, dict)
    ]
    counts, kill = record["requests"], record["kill"]
    lines = [
        f"{counts['all']} requests, {counts['left_by_clients']} left by their clients, {counts['failed']} failed; "
        f"median {_shown(counts['median_seconds'])} s, longest {_shown(counts['longest_seconds'])} s.",
        f"Killed: {kill['errors']} of {kill['requests']} requests in errors, {kill['hanging']} hanging, status "
        f"{kill['status']}, {kill['seconds']:.1f} s.",
        "Problems: " + ("; ".join(record["problems"]) or "none"),
        *(f"Note: {note}" for note in record["notes"]),
    ]
    tables = [markdown_table(header, rows), markdown_table(["MiB", "early", "late", "peak", "growth"], memory)]
    return "\n\n".join([title, *tables, *lines])


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
