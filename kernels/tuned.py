"""Tile configurations tuned for a shape and a device, in vLLM's file naming and choice of the nearest token count.

A file ``E=8,N=14336,device_name=NVIDIA_H100_80GB_HBM3,dtype=int3_milo.json`` holds ``triton_version`` and, by number
of tokens, one configuration (a JSON object, whose fields are the launcher's business). Files are looked for in the
folder that ``VLLM_MILO_TUNED_CONFIG_FOLDER`` names, then in ``tuned/`` beside this module.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("vllm.milo")

FOLDER_VARIABLE = "VLLM_MILO_TUNED_CONFIG_FOLDER"
OWN_FOLDER = Path(__file__).parent / "tuned"
VERSION_KEY = "triton_version"
DTYPE = "int3_milo"


def file_name(experts: int, intermediate: int, device_name: str) -> str:
    """Return the name of the file for a layer.

    Args:
        experts: local experts.
        intermediate: this process's share of an expert's intermediate size, padded to a multiple of 64.
        device_name: as PyTorch gives it; all H200s share one name, as in vLLM.
    """
    device = device_name.replace(" ", "_").replace("/", "_")
    if "H200" in device.split("_"):
        device = "NVIDIA_H200"
    return f"E={experts},N={intermediate},device_name={device},dtype={DTYPE}.json"


def read_file(path: Path) -> dict[int, dict[str, Any]]:
    """Return the configurations of a file by number of tokens.

    Raises:
        ValueError: the file is not JSON, has no configuration, or one that is no object under a token count.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        configs = {int(key): value for key, value in content.items() if key != VERSION_KEY}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a tuned configuration file ({error}); tune again or remove it") from None
    if not configs or not all(isinstance(value, dict) for value in configs.values()):
        raise ValueError(f"{path}: needs an object for each of one or more token counts; tune again or remove it")
    return configs


def write_file(path: Path, configs: Mapping[int, Mapping[str, Any]], triton_version: str) -> None:
    """Write configurations by number of tokens."""
    content: dict[str, Any] = {VERSION_KEY: triton_version}
    content |= {str(tokens): dict(configs[tokens]) for tokens in sorted(configs)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@cache
def load(experts: int, intermediate: int, device_name: str) -> dict[int, dict[str, Any]] | None:
    """Return the configurations of a layer by number of tokens, or None, after one line in the log, without a file.

    Raises:
        ValueError: the file is broken.
    """
    name = file_name(experts, intermediate, device_name)
    user_folder = os.environ.get(FOLDER_VARIABLE)
    folders = [Path(user_folder)] if user_folder else []
    for folder in (*folders, OWN_FOLDER):
        if (folder / name).is_file():
            logger.info("MiLo experts use the tuned configuration %s", folder / name)
            return read_file(folder / name)
    logger.info(
        "MiLo experts use heuristic tiles: no %s; python -m benchmarks.kernels.tune makes one, %s names its folder",
        name,
        FOLDER_VARIABLE,
    )
    return None


def nearest(configs: Mapping[int, dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Return the configuration of the nearest token count, as vLLM does; of two as near, the first in the file."""
    return configs[min(configs, key=lambda count: abs(count - tokens))]


def find(experts: int, intermediate: int, tokens: int, device: torch.device) -> dict[str, Any] | None:
    """Return the tuned configuration for a layer and a number of tokens on a device; None where there is none."""
    configs = load(experts, intermediate, _device_name(device)) if device.type == "cuda" else None
    return None if configs is None else nearest(configs, tokens)


@cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)
