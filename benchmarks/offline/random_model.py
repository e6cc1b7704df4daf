"""Models of random weights in the shapes of well-known ones, with as many layers as wanted."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.offline.solver_speed import SOURCE_STD
from benchmarks.serving.models import BASE, MODELS

LAYERS = {"mixtral": 32, "qwen3": 48}
"""Decoder layers of Mixtral-8x7B and Qwen3-30B-A3B."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add which models are written, of what size, and where."""
    parser.add_argument("models", nargs="+", choices=list(LAYERS))
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--scale", type=int, default=1, help="divide all sizes by this, for a trial")


def write_model(folder: Path, name: str, layers: int, tokenizer: Path, device: str, scale: int = 1) -> None:
    """Write a model with random weights; config.json last, so that it is there only when the rest is."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, folder / file.name)
    words = len(json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]) + 1024
    config: dict[str, Any] = BASE | MODELS[name].config | {"num_hidden_layers": layers, "vocab_size": words}
    for key in ("hidden_size", "intermediate_size", "moe_intermediate_size"):
        if key in config:
            config[key] //= scale
    generator = torch.Generator(device).manual_seed(0)
    weights: dict[str, str] = {}
    for shard, shapes in enumerate([list(edges(config)), *(list(layer(config, name, i)) for i in range(layers))]):
        held = {}
        for tensor, shape in shapes:
            values = torch.empty(shape, dtype=torch.bfloat16, device=device)
            norm = len(shape) == 1
            held[tensor] = (values.fill_(1) if norm else values.normal_(std=SOURCE_STD, generator=generator)).cpu()
            weights[tensor] = f"model-{shard:02d}.safetensors"
        save_file(held, folder / f"model-{shard:02d}.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def edges(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of what lies outside the layers."""
    hidden, words = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (words, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (words, hidden)


def layer(config: dict[str, Any], name: str, index: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of a decoder layer."""
    hidden, prefix = config["hidden_size"], f"model.layers.{index}"
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, values = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    for leaf, shape in (("q", (queries, hidden)), ("k", (values, hidden)), ("v", (values, hidden))):
        yield f"{prefix}.self_attn.{leaf}_proj.weight", shape
    yield f"{prefix}.self_attn.o_proj.weight", (hidden, queries)
    if name == "qwen3":
        yield f"{prefix}.self_attn.q_norm.weight", (head,)
        yield f"{prefix}.self_attn.k_norm.weight", (head,)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}.{norm}.weight", (hidden,)
    block = f"{prefix}.{'block_sparse_moe' if name == 'mixtral' else 'mlp'}"
    if config["model_type"] == "qwen2_moe":
        for leaf, size in (("q", queries), ("k", values), ("v", values)):
            yield f"{prefix}.self_attn.{leaf}_proj.bias", (size,)
        shared = config["shared_expert_intermediate_size"]
        for leaf, shape in (("gate", (shared, hidden)), ("up", (shared, hidden)), ("down", (hidden, shared))):
            yield f"{block}.shared_expert.{leaf}_proj.weight", shape
        yield f"{block}.shared_expert_gate.weight", (1, hidden)
    experts = config.get("num_local_experts") or config["num_experts"]
    inner = config.get("moe_intermediate_size") or config["intermediate_size"]
    yield f"{block}.gate.weight", (experts, hidden)
    gate, up, down = MODELS[name].projections
    for expert in range(experts):
        for leaf, shape in ((gate, (inner, hidden)), (up, (inner, hidden)), (down, (hidden, inner))):
            yield f"{block}.experts.{expert}.{leaf}.weight", shape
