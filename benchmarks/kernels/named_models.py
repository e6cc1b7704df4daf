"""Well-known models by their settings and the shapes of their weights, from which the converter plans ranks and groups.

A stand-in is a folder with config.json and one safetensors file, whose weights are a hole: nothing but headers is read.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from vllm_milo.command.expert_layers import expert_shapes
from vllm_milo.kernels.weights import MoEShape
from vllm_milo.offline.presets import DEFAULT_PRESET

Tensor = tuple[str, tuple[int, ...]]


class NamedModel(NamedTuple):
    """A model.

    Attributes:
        title: for people.
        config: its config.json, without what no shape follows from.
        block: of a layer, that holds the experts.
        projections: an expert's gate, up and down.
        shared: name of the shared experts inside the block, and their intermediate size; None without.
        shared_gate: whether these have a gate.
        dense_layers: first layers that have an FFN in place of experts.
        norms: on queries and keys, of a head's size.
    """

    title: str
    config: dict[str, Any]
    block: str = "mlp"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: tuple[str, int] | None = None
    shared_gate: bool = False
    dense_layers: int = 0
    norms: bool = False


def _sizes(model_type: str, layers: int, hidden: int, heads: int, key_heads: int, head: int, **more: Any) -> dict:
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head,
        "dtype": "bfloat16",
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        "num_experts_per_tok": 8,
        **more,
    }


_LINEAR = {
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 10,
}
MODELS = {
    "mixtral": NamedModel(
        "Mixtral-8x7B",
        _sizes("mixtral", 32, 4096, 32, 8, 128, num_local_experts=8, intermediate_size=14336, num_experts_per_tok=2),
        block="block_sparse_moe",
        projections=("w1", "w3", "w2"),
    ),
    "qwen3": NamedModel(
        "Qwen3-30B-A3B",
        _sizes("qwen3_moe", 48, 2048, 32, 4, 128, num_experts=128, moe_intermediate_size=768, intermediate_size=6144),
        norms=True,
    ),
    "qwen3.5": NamedModel(
        "Qwen3.5-35B-A3B",
        _sizes("qwen3_5_moe_text", 40, 2048, 16, 2, 256, num_experts=256, moe_intermediate_size=512, **_LINEAR),
        shared=("shared_expert", 512),
        shared_gate=True,
        norms=True,
    ),
    "deepseek": NamedModel(
        "DeepSeek-MoE-16B",
        _sizes("deepseek", 28, 2048, 16, 16, 128, n_routed_experts=64, moe_intermediate_size=1408, n_shared_experts=2)
        | {"intermediate_size": 10944, "first_k_dense_replace": 1, "num_experts_per_tok": 6, "moe_layer_freq": 1},
        shared=("shared_experts", 2816),
        dense_layers=1,
    ),
    "glm": NamedModel(
        "GLM-4.5-Air",
        _sizes("glm4_moe", 46, 4096, 96, 8, 128, n_routed_experts=128, moe_intermediate_size=1408, n_shared_experts=1)
        | {"intermediate_size": 10944, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0},
        shared=("shared_experts", 1408),
        dense_layers=1,
    ),
    "olmoe": NamedModel(
        "OLMoE-1B-7B",
        _sizes("olmoe", 16, 2048, 16, 16, 128, num_experts=64, intermediate_size=1024),
    ),
    "qwen2-57b": NamedModel(
        "Qwen2-57B-A14B",
        _sizes("qwen2_moe", 28, 3584, 28, 4, 128, num_experts=64, moe_intermediate_size=2560, intermediate_size=18944)
        | {"shared_expert_intermediate_size": 20480},
        shared=("shared_expert", 20480),
        shared_gate=True,
    ),
}
SHIPPED = ("mixtral", "qwen3", "qwen3.5", "deepseek", "glm")
"""Models whose tiles come with the package; the others show what the heuristic does for shapes that it has not seen."""


def named_shape(name: str, tensor_parallel: int = 1, preset: str = DEFAULT_PRESET) -> MoEShape:
    """Return the shape of the experts of most layers, as a preset makes them, in one process."""
    with stand_in(name) as folder:
        return next(iter(expert_shapes(folder, tensor_parallel, preset)))


@contextmanager
def stand_in(name: str) -> Iterator[Path]:
    """Yield a folder with a model's settings and headers, which goes when the context ends."""
    model = MODELS[name]
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        (folder / "config.json").write_text(json.dumps(model.config), encoding="utf-8")
        end, entries = 0, {}
        for tensor, shape in _tensors(model):
            start, end = end, end + 2 * math.prod(shape)
            entries[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        header = json.dumps(entries).encode()
        with (folder / "model.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + end)
        yield folder


def _tensors(model: NamedModel) -> Iterator[Tensor]:
    hidden, words = model.config["hidden_size"], model.config["vocab_size"]
    yield from (("model.embed_tokens.weight", (words, hidden)), ("lm_head.weight", (words, hidden)))
    yield "model.norm.weight", (hidden,)
    for number in range(model.config["num_hidden_layers"]):
        prefix = f"model.layers.{number}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{norm}.weight", (hidden,)
        linear = model.config.get("layer_types", {number: ""})[number] == "linear_attention" if _mixes(model) else False
        attention = _linear_attention if linear else _attention
        block = _ffn(model, model.config["intermediate_size"]) if number < model.dense_layers else _experts(model)
        for name, shape in (*attention(model), *((f"{model.block}.{name}", shape) for name, shape in block)):
            yield f"{prefix}.{name}", shape


def _mixes(model: NamedModel) -> bool:
    return "layer_types" in model.config


def _attention(model: NamedModel) -> Iterator[Tensor]:
    config = model.config
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    outputs = 2 * queries if _mixes(model) else queries  # with a gate
    yield from (("self_attn.q_proj.weight", (outputs, hidden)), ("self_attn.o_proj.weight", (hidden, queries)))
    yield from ((f"self_attn.{part}_proj.weight", (keys, hidden)) for part in ("k", "v"))
    if model.norms:
        yield from ((f"self_attn.{part}_norm.weight", (head,)) for part in ("q", "k"))


def _linear_attention(model: NamedModel) -> Iterator[Tensor]:
    config, hidden = model.config, model.config["hidden_size"]
    values = config["linear_num_value_heads"] * config["linear_value_head_dim"]
    both = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"] + values
    heads = config["linear_num_value_heads"]
    shapes: Mapping[str, tuple[int, ...]] = {
        "in_proj_qkv.weight": (both, hidden),
        "in_proj_z.weight": (values, hidden),
        "in_proj_b.weight": (heads, hidden),
        "in_proj_a.weight": (heads, hidden),
        "out_proj.weight": (hidden, values),
        "conv1d.weight": (both, 1, config["linear_conv_kernel_dim"]),
        "norm.weight": (config["linear_value_head_dim"],),
        "A_log": (heads,),
        "dt_bias": (heads,),
    }
    yield from ((f"linear_attn.{name}", shape) for name, shape in shapes.items())


def _experts(model: NamedModel) -> Iterator[Tensor]:
    config, hidden = model.config, model.config["hidden_size"]
    experts = next(config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in config)
    inner = config.get("moe_intermediate_size") or config["intermediate_size"]
    yield "gate.weight", (experts, hidden)
    for expert in range(experts):
        yield from ((f"experts.{expert}.{name}", shape) for name, shape in _ffn(model, inner))
    if model.shared is not None:
        name, size = model.shared
        yield from ((f"{name}.{leaf}", shape) for leaf, shape in _ffn(model, size))
    if model.shared_gate:
        yield "shared_expert_gate.weight", (1, hidden)


def _ffn(model: NamedModel, inner: int) -> Iterator[Tensor]:
    hidden, (gate, up, down) = model.config["hidden_size"], model.projections
    for name, shape in ((gate, (inner, hidden)), (up, (inner, hidden)), (down, (hidden, inner))):
        yield f"{name}.weight", shape
