"""MiLo checkpoints of random codes in the shapes of well-known models, with ragged ranks: for what only reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.offline.random_model import edges, layer
from benchmarks.serving.models import BASE, MODELS, milo
from vllm_milo.checkpoint import MiLoFormat

RANKS = (0, 8, 16, 24, 32, 48)
"""Ranks of experts, one after another; each layer begins with another, and in a third of them rank 96 is among them."""
DENSE_FRACTION = 1 / 8
MODEL_DTYPE = "BF16"
DTYPES = {"I32": torch.int32, "I8": torch.int8, "F16": torch.float16, "BF16": torch.bfloat16}


def write_checkpoint(folder: Path, name: str, layers: int, scale: int = 1) -> None:
    """Write a checkpoint that vLLM serves; config.json last, so that it is there only when the rest is.

    Args:
        folder: is made.
        name: of a model of ``random_model``.
        layers: decoder layers.
        scale: divides all sizes, for a trial.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = BASE | MODELS[name].config | {"num_hidden_layers": layers}
    for key in ("hidden_size", "intermediate_size", "moe_intermediate_size", "vocab_size"):
        if key in config:
            config[key] //= scale
    config["quantization_config"] = quantization(config, name)
    fmt = MiLoFormat.from_dict(config["quantization_config"])
    experts = config.get("num_local_experts") or config["num_experts"]
    weights: dict[str, str] = {}
    for shard, shapes in enumerate([list(edges(config)), *(list(layer(config, name, i)) for i in range(layers))]):
        held = dict(pair for tensor, shape in shapes for pair in random_tensors(fmt, tensor, shape, experts))
        file = f"model-{shard:02d}.safetensors"
        weights |= dict.fromkeys(held, file)
        save_file(held, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def quantization(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a contract whose experts differ in rank, within a layer and from layer to layer."""
    made = milo(MODELS[name], 0, 0)
    dense = int(config["hidden_size"] * DENSE_FRACTION)
    made["ranks"]["modules"] = dict.fromkeys(made["ranks"]["modules"], dense)
    experts = config.get("num_local_experts") or config["num_experts"]
    tables = {}
    for index in range(config["num_hidden_layers"]):
        known = (*RANKS, 96) if index % 3 == 0 else RANKS
        ranks = [known[(index + expert) % len(known)] for expert in range(experts)]
        tables[rf"re:.*\.layers\.{index}\..*experts"] = dict.fromkeys(MODELS[name].projections, ranks)
    made["ranks"]["experts"] = tables
    return made


def random_tensors(
    fmt: MiLoFormat, name: str, shape: tuple[int, ...], experts: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what the checkpoint holds of a tensor of the original model: itself, or what it is quantized to."""
    module = name.rpartition(".")[0]
    if len(shape) == 1 or module.endswith("embed_tokens") or fmt.ignores(module):
        yield name, (torch.ones if len(shape) == 1 else torch.zeros)(shape, dtype=torch.bfloat16)
        return
    rank = rank_of(fmt, module, experts)
    n, k = shape
    specs = fmt.base_tensors(n, k, fmt.group_size) | fmt.factor_tensors(n, k, rank, MODEL_DTYPE)
    for tensor, (dtype, sizes) in specs.items():
        kind = DTYPES[dtype]
        if kind.is_floating_point:
            value = 3.5 if tensor == "weight_zero" else 0.01
            yield f"{module}.{tensor}", torch.full(sizes, value, dtype=kind)
        else:
            limits = torch.iinfo(kind)
            yield f"{module}.{tensor}", torch.randint(limits.min, limits.max, sizes, dtype=kind)


def rank_of(fmt: MiLoFormat, module: str, experts: int) -> int:
    """Return the rank of a matrix, by the name of its module."""
    parent, dot, rest = module.rpartition(".experts.")
    if not dot:
        return fmt.ranks.of_module(module)
    expert, projection = rest.split(".")
    return fmt.ranks.of_expert(f"{parent}.experts", projection, int(expert), experts)
