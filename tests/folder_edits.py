"""Edits of a model folder, or of a checkpoint, that break it."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_format(folder: Path, **changes) -> None:
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config=quantization | changes)


def edit_tensors(folder: Path, file: str, edit) -> None:
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        index.unlink()


def narrow_down_projections(folder: Path, file: str) -> None:
    """Leave the experts' down projections 80 inputs, which no group size divides."""

    def edit(tensors):
        for name in tensors:
            if ".experts." in name and "down_proj" in name:
                tensors[name] = tensors[name][..., :80].contiguous()

    edit_tensors(folder, file, edit)
