"""What is said at the end of a conversion: its result, its weakest places, and how to serve it."""

from __future__ import annotations

import os
import shlex
import sys
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_milo.values import size_text

from ..checkpoint.inspect import inspect_checkpoint, name_group_sizes
from ..conversion import Summary
from ..progress import log_event


def serve_command(folder: Path) -> str:
    """Return the command that serves a checkpoint, for a shell."""
    return f"vllm serve {shlex.quote(str(folder))} --quantization milo"


def serve_lines(folder: Path) -> str:
    """Return what is printed of how to serve a checkpoint: the command, and what stands for it in vLLM's CPU build.

    That has no metadata of a package named vllm, which its own command ``vllm`` asks for.
    """
    lines = f"serve it: {serve_command(folder)}"
    if find_spec("vllm") is not None and not any(distributions(name="vllm")):
        module = f"python -m vllm.entrypoints.openai.api_server --model {shlex.quote(str(folder))}"
        lines += f"\nwith vLLM's CPU build, as here: {module} --quantization milo"
    return lines


def print_summary(summary: Summary) -> Path:
    """Print what a conversion did, and log it; return where its checkpoint is."""
    for warning in summary.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    peak = f"{summary.peak_host_bytes / 2**30:.2f} GiB of host memory"
    if summary.peak_device_bytes:
        peak += f", {summary.peak_device_bytes / 2**30:.2f} GiB of device memory"
    report = inspect_checkpoint(summary.out)
    groups = f" in {name_group_sizes(report)}" if len(report["group_sizes"]) > 1 else ""
    lines = [
        f"{summary.out}: {summary.matrices} matrices in {summary.seconds:.1f} s, "
        f"{size_text(summary.bytes_written)}, {report['bits_per_weight']:.3f} bits a weight{groups}, "
        f"mean relative error {summary.mean_error:.4f}; peak {peak}",
        "largest relative errors, before codes are learned:",
        *(f"  {entry.error:.4f}  rank {entry.rank:<4}  {name}" for name, entry in summary.worst.items()),
        serve_lines(summary.out),
    ]
    _print_what_can_be("\n".join(lines))
    log_event("summary", **_describe(summary, report))
    return summary.out


def _print_what_can_be(text: str) -> None:
    """Print a text; an output that is full or closed undoes nothing, and what comes after, as an upload, goes on."""
    try:
        print(text, flush=True)
    except OSError as error:
        silence_stdout()
        print(f"warning: the summary cannot be printed: {error.strerror}", file=sys.stderr)


def silence_stdout() -> None:
    """Let stdout lead nowhere: what its buffer holds would fail once more when the process ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _describe(summary: Summary, report: dict[str, Any]) -> dict[str, Any]:
    """Return a summary as JSON, with what the checkpoint's headers tell."""
    worst = [{"matrix": name, "error": entry.error, "rank": entry.rank} for name, entry in summary.worst.items()]
    said = {"bits_per_weight": report["bits_per_weight"], "serve": serve_command(summary.out)}
    return summary._asdict() | {"out": str(summary.out), "worst": worst} | said
