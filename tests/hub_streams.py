"""What tests of `--delete-source-shards` share: a model in several shards on a Hub, and conversions of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub_server import COMMIT, HubServer, of_folder
from huggingface_hub import constants
from safetensors.torch import load_file, save

from vllm_milo.offline.cli import main
from vllm_milo.shards import INDEX_NAME

NAME = "org/tiny"
STREAM = "--delete-source-shards"
PLAIN = ["--method", "rtn", "--quiet", "--device", "cpu"]
ALONG = ["--calibration-windows", "2", "--learn-steps", "1", "--quiet", "--device", "cpu"]
"""The default preset, in seconds."""


def by_layer(tensor: str) -> int:
    """The embedding, each of the four layers, and the rest."""
    if "embed_tokens" in tensor:
        return 0
    return 1 + int(tensor.split(".")[2]) if ".layers." in tensor else 5


def put(hub: HubServer, deep_model: Path, shard_of: Callable[[str], int], **changed: torch.Tensor) -> list[str]:
    """Put a model into several shards on the Hub; return their names."""
    shards: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in (load_file(deep_model / "model.safetensors") | changed).items():
        shards.setdefault(shard_of(name), {})[name] = tensor
    names = {number: f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in sorted(shards)}
    weight_map = {tensor: names[number] for number, held in shards.items() for tensor in held}
    files = {names[number]: save(held, metadata={"format": "pt"}) for number, held in shards.items()}
    files[INDEX_NAME] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    hub.repositories[NAME] = of_folder(deep_model, **files)
    del hub.repositories[NAME].commits[COMMIT]["model.safetensors"]
    return list(names.values())


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def local(hub: HubServer, tmp_path: Path, *options: str) -> dict[str, bytes]:
    """What a conversion of the whole snapshot gives; the cache is emptied of weights after it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "whole-cache"))
        assert main(["quantize", NAME, "-o", str(tmp_path / "whole" / "out"), *options]) == 0
    hub.asked.clear()
    return content(tmp_path / "whole" / "out")


def weights(hub: HubServer) -> list[str]:
    """The shards that were asked for as a whole, in order."""
    return [line.rpartition("/")[2] for line in hub.asked if line.startswith("GET") and line.endswith(".safetensors")]


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def stream(tmp_path: Path, *options: str) -> int:
    return main(["quantize", NAME, "-o", str(tmp_path / "out"), STREAM, *options])


def failure(capsys: pytest.CaptureFixture[str], tmp_path: Path, *options: str) -> str:
    """The one line that a conversion fails with."""
    capsys.readouterr()
    assert stream(tmp_path, *options) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    return line
