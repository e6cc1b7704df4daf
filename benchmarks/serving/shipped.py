"""What ``milo quantize`` makes of a model of known shapes, for dummy weights: ranks and groups, by headers alone."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from benchmarks.offline.random_model import edges, layer
from benchmarks.serving.models import BASE, MODELS
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.planning.plan import decide_format
from vllm_milo.offline.presets import PRESETS, milo_recipe
from vllm_milo.offline.source.reader import ModelReader

BFLOAT16_BYTES = 2


@cache
def shipped_format(name: str, layers: int, preset: str = "balanced") -> dict[str, Any]:
    """Return the ``quantization_config`` of a checkpoint with a preset's bits, in its groups, with its ranks by role.

    Ranks by role are what ``fast`` gives, and what a preset along a text begins with: it then shares the same bits
    among a layer's roles by what they need, which dummy weights do not tell.

    Args:
        name: of :data:`benchmarks.serving.models.MODELS`.
        layers: of the model.
        preset: whose bits are spent.
    """
    chosen = PRESETS[preset]
    assert chosen.budget_bits is not None, f"{preset} has no budget of bits"
    recipe = milo_recipe(False, group_size=chosen.groups(chosen.calibrated, None))
    conversion = Conversion(recipe, budget_bits=chosen.budget_bits, serving_share=chosen.serving_share)
    with tempfile.TemporaryDirectory() as folder:
        write_headers(Path(folder), name, layers)
        return decide_format(ModelReader(Path(folder)), conversion)[0].to_dict()


def write_headers(folder: Path, name: str, layers: int) -> None:
    """Write a model without weights: its config and a safetensors file whose tensors are one hole in the disk."""
    config = BASE | MODELS[name].config | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = [*edges(config), *(each for index in range(layers) for each in layer(config, name, index))]
    header, end = _header(shapes)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


def _header(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> tuple[bytes, int]:
    entries: dict[str, Any] = {}
    end = 0
    for name, shape in shapes:
        start, end = end, end + BFLOAT16_BYTES * prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries)
    return text.encode().ljust(-(-len(text) // 8) * 8), end
