"""MiLo checkpoints of any family, made without the converter, and the unquantized model that each must equal.

A source is rounded to the nearest codes and gets random factors. Every family that vLLM loads can be served this way,
whether or not the converter knows it; what it is compared with is vLLM itself on the weights s·(q - z) + UᵀV.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from random_layers import random_factor
from safetensors.torch import load_file, save_file
from tiny_models import COMMON, fill, randomize

from vllm_milo.checkpoint import CompensatorFormat, MiLoFormat, RankTable
from vllm_milo.kernels.packing import pack_codes
from vllm_milo.names import ROUTERS, Keys, leaf_of, split_expert_name
from vllm_milo.offline.checkpoint.dequantize import DequantizedTensors
from vllm_milo.validation import read_format

GROUP = 64
_GQA = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
_MLA = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "q_lora_rank": None,
}
_DEEPSEEK = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 128,
    "intermediate_size": 256,
    "first_k_dense_replace": 1,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**_MLA, **_DEEPSEEK, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "minimax_m2": {
        **_GQA,
        "intermediate_size": 128,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rotary_dim": 32,
        "scoring_func": "softmax",  # vLLM's router of CPUs asserts it
        "use_routing_bias": False,
        "use_qk_norm": True,
        "num_mtp_modules": 0,
    },
    "dots1": {**_GQA, **_DEEPSEEK},
    "solar_open": {**_GQA, **_DEEPSEEK, "n_shared_experts": 1, "first_k_dense_replace": 0},
    "granitemoeshared": {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 256,
        "attention_multiplier": 0.1,
    },
    "exaone_moe": {
        **_GQA,
        "num_hidden_layers": 4,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "sliding_window": 64,
    },
    "llama4_text": {
        **_GQA,
        "intermediate_size": 128,
        "intermediate_size_mlp": 256,
        "num_local_experts": 8,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 256,
    },
}
"""Tiny configurations of families, by model type."""
_CONFIGURATION = """from transformers import PretrainedConfig


class OwnConfig(PretrainedConfig):
    model_type = "{}"
"""
"""What models that transformers does not know bring along; vLLM runs it with --trust-remote-code."""


def make_source(family: str, folder: Path, **changes: Any) -> Path:
    """Save a random model of a family whose class transformers has."""
    config = transformers.AutoConfig.for_model(family, **{**COMMON, **CONFIGS[family], **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    fill(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    if getattr(config, "use_routing_bias", True) is False:  # transformers saves it nevertheless
        _edit(folder, lambda state: {name: state[name] for name in state if not name.endswith("correction_bias")})
    return folder


def make_llama4(folder: Path) -> Path:
    """Save a random Llama-4 whose experts are stored one by one."""
    return _edit(make_source("llama4_text", folder), _apart)


def _apart(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Cut the experts of fused tensors [E, H, 2·I] and [E, I, H]."""
    apart: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        experts, _, leaf = name.rpartition(".")
        if tensor.dim() != 3:
            apart[name] = tensor
            continue
        leaves = ["down_proj"] if leaf == "down_proj" else ["gate_proj", "up_proj"]
        for index, expert in enumerate(tensor):
            for own, matrix in zip(leaves, expert.T.chunk(len(leaves)), strict=True):
                apart[f"{experts}.{index}.{own}.weight"] = matrix.contiguous()
    return apart


def make_deepseek(folder: Path) -> Path:
    """Save a random DeepSeek-MoE, as the 16B model is: transformers has no class for it."""
    config = COMMON | _DEEPSEEK | {"num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-6}
    config |= {"model_type": "deepseek", "architectures": ["DeepseekForCausalLM"], "hidden_act": "silu"}
    config |= {"moe_layer_freq": 1, "norm_topk_prob": False, "scoring_func": "softmax", "rope_theta": 10000.0}
    hidden = config["hidden_size"]
    shapes = {"model.embed_tokens": (256, hidden), "lm_head": (256, hidden), "model.norm": (hidden,)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        shapes |= {f"{layer}.self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{layer}.{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
        if index == 0:
            shapes |= _ffn(f"{layer}.mlp", hidden, 256)
            continue
        shapes |= {f"{layer}.mlp.gate": (8, hidden)} | _ffn(f"{layer}.mlp.shared_experts", hidden, 256)
        for expert in range(8):
            shapes |= _ffn(f"{layer}.mlp.experts.{expert}", hidden, 128)
    torch.manual_seed(0)
    state = {f"{name}.weight": torch.empty(shape) for name, shape in shapes.items()}
    for name, tensor in state.items():
        randomize(name, tensor)
    state["model.embed_tokens.weight"].normal_()
    folder.mkdir(parents=True)
    save_file({name: tensor.bfloat16() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return bring_configuration(folder, "deepseek")


def bring_configuration(folder: Path, model_type: str) -> Path:
    """Give a model the code of its configuration, as those bring it along that transformers does not know."""
    (folder / "configuration_own.py").write_text(_CONFIGURATION.format(model_type))
    return copy_settings(folder, folder, {"auto_map": {"AutoConfig": "configuration_own.OwnConfig"}})


def _ffn(name: str, hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    return {
        f"{name}.gate_proj": (inner, hidden),
        f"{name}.up_proj": (inner, hidden),
        f"{name}.down_proj": (hidden, inner),
    }


def quantize(source: Path, out: Path, rank: int = 16, ignore: Iterable[str] = (), bits: int = 3) -> Path:
    """Write a MiLo checkpoint of a model: every expert and linear layer has a rank, experts of even index none less.

    Every odd expert has half the rank; ``ignore`` keeps layers as they are, by names or ``re:`` patterns.
    """
    state = load_file(source / "model.safetensors")
    keys, kept = Keys(ignore), list(ignore)
    compensator = CompensatorFormat(bits)
    tensors: dict[str, torch.Tensor] = {}
    modules: dict[str, int] = {}
    experts: dict[str, dict[str, dict[int, int]]] = {}
    for name, weight in state.items():
        module = name.removesuffix(".weight")
        if not _is_quantized(name, weight, keys):
            tensors[name] = weight
            if name.endswith(".weight") and weight.dim() == 2 and ".layers." in name and not keys.find(module):
                kept.append(module)
            continue
        own = rank
        if (expert := split_expert_name(module)) is not None:
            own = rank // 2 if expert[1] % 2 else rank
            experts.setdefault(expert[0], {}).setdefault(expert[2], {})[expert[1]] = own
        else:
            modules[module] = own
        tensors |= {f"{module}.{leaf}": tensor for leaf, tensor in _quantized(weight, own, bits).items()}
    table = {
        layer: {projection: [ranks[i] for i in range(len(ranks))] for projection, ranks in projections.items()}
        for layer, projections in experts.items()
    }
    fmt = MiLoFormat(GROUP, compensator, RankTable(0, modules, table), tuple(kept))
    return _write(source, out, tensors, {"quantization_config": fmt.to_dict()})


def _is_quantized(name: str, weight: torch.Tensor, ignored: Keys) -> bool:
    module = name.removesuffix(".weight")
    if not name.endswith(".weight") or weight.dim() != 2 or ".layers." not in name:
        return False
    return leaf_of(module) not in ROUTERS and ignored.find(module) is None


def _quantized(weight: torch.Tensor, rank: int, bits: int) -> dict[str, torch.Tensor]:
    groups = weight.float().unflatten(-1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 7).half()
    zero = (-low / scale.float()).half()
    codes = (groups / scale.float() + zero.float()).round().clamp(0, 7).to(torch.uint8).flatten(-2)
    tensors = {"weight_packed": pack_codes(codes), "weight_scale": scale.squeeze(-1), "weight_zero": zero.squeeze(-1)}
    if rank:
        for leaf, columns in (("weight_u", weight.shape[0]), ("weight_v", weight.shape[1])):
            tensors[leaf], factor_scale = random_factor(rank, columns, bits)
            if bits != 16:
                tensors[f"{leaf}_scale"] = factor_scale
    return tensors


def dequantized(checkpoint: Path, out: Path, device: str = "cpu") -> Path:
    """Write the unquantized float32 model that a checkpoint stands for, computed on ``device``."""
    fmt, _ = read_format(checkpoint)
    tensors = DequantizedTensors(checkpoint, fmt, torch.float32, device).load()
    floats = {name: (tensor.float() if tensor.is_floating_point() else tensor).cpu() for name, tensor in tensors}
    return _write(checkpoint, out, floats, {"dtype": "float32"}, without=("quantization_config",))


def rename(folder: Path, pattern: str, replacement: str) -> Path:
    """Rename the tensors of a model in place."""
    return _edit(folder, lambda state: {re.sub(pattern, replacement, name): state[name] for name in state})


def _edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    state = load_file(folder / "model.safetensors")
    changed = change(state)
    assert changed.keys() != state.keys()
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def copy_settings(source: Path, out: Path, changes: Mapping[str, Any], without: tuple[str, ...] = ()) -> Path:
    """Copy all of a model but its weights, with changes of config.json."""
    out.mkdir(parents=True, exist_ok=True)
    for file in (*source.glob("*.json"), *source.glob("*.py")):
        if out != source and not file.name.endswith(".index.json"):
            shutil.copy(file, out)
    config = json.loads((source / "config.json").read_text()) | changes
    (out / "config.json").write_text(json.dumps({key: config[key] for key in config if key not in without}))
    return out


def _write(
    source: Path,
    out: Path,
    tensors: Mapping[str, torch.Tensor],
    changes: Mapping[str, Any],
    without: tuple[str, ...] = (),
) -> Path:
    copy_settings(source, out, changes, without)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, out / "model.safetensors", metadata={"format": "pt"})
    return out
