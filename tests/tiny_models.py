"""Tiny random models of every supported family, and the Hugging Face side of comparisons with vLLM."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file

from vllm_milo.offline.source.whole_model import load_source_model

VOCABULARY = 256
TEXT = Path(__file__).parent / "assets" / "valid.txt"

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

FAMILIES: dict[str, dict[str, Any]] = {
    # one K/V head, so that tensor parallelism replicates it
    "mixtral": {
        "intermediate_size": 128,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
    },
    "qwen2_moe": {
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 256,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "decoder_sparse_step": 2,  # layer 0 is dense
    },
    "qwen3_moe": {
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "norm_topk_prob": True,
    },
    "olmoe": {
        "intermediate_size": 128,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "clip_qkv": None,
    },
}


ODD = {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 6}
"""Changes a model so that groups of 64 divide its hidden size and groups of 128 do not; they divide its other sizes."""


def make_model(family: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """Save a random model with weights, biases and norms large enough that every part of it matters.

    ``changes`` are of its configuration.
    """
    config = transformers.AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    fill(model)
    model.to(dtype).save_pretrained(folder)
    return folder


@torch.no_grad()
def randomize(name: str, parameter: torch.Tensor) -> None:
    """Fill a parameter at random, by what its name says that it is."""
    if "norm" in name:
        parameter.uniform_(0.5, 1.5)
    elif name.endswith("A_log"):
        parameter.uniform_(1.0, 2.0)
    elif name.endswith("bias"):
        parameter.normal_(std=0.3)
    else:
        parameter.normal_(std=0.6 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.1)


@torch.no_grad()
def fill(model: Any) -> None:
    """Fill a model at random, with weights, biases and norms large enough that every part of it matters."""
    for name, parameter in model.named_parameters():
        randomize(name, parameter)
    for name, buffer in model.named_buffers():
        if name.endswith("bias"):  # of routers
            buffer.normal_(std=0.1)
    config = model.config.get_text_config()
    out = 0.25 * (128 / config.hidden_size) ** 0.5  # logits of one size, however wide
    for leaf, std in (("embed_tokens.weight", out if config.tie_word_embeddings else 1.0), ("lm_head.weight", out)):
        for name, parameter in model.named_parameters():
            if name.endswith(leaf):
                parameter.normal_(std=std)


def cut_model(source: Path, folder: Path, layers: int, experts: int) -> Path:
    """Copy a Qwen2-MoE with its first layers and their first experts alone, of which two are active."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "layer_types": config["layer_types"][:layers]}
    config |= {"num_experts": experts, "num_experts_per_tok": 2}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    held = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        layer, expert = (re.search(rf"\.{kind}\.(\d+)\.", name) for kind in ("layers", "experts"))
        if (layer and int(layer[1]) >= layers) or (expert and int(expert[1]) >= experts):
            continue
        held[name] = tensor[:experts].contiguous() if name.endswith(".mlp.gate.weight") else tensor
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def fuse_experts(source: Path, folder: Path) -> Path:
    """Copy a model with the experts of each layer in 3-D tensors, as transformers 5 holds them in memory."""
    shutil.copytree(source, folder)
    model = load_source_model(source, torch.bfloat16)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.get_text_config().tie_word_embeddings:
        del state["lm_head.weight"]
    assert any(tensor.dim() == 3 for tensor in state.values())
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def expert_counts(config: Any) -> dict[str, list[int]]:
    """Uneven counts for every MoE layer, so that the frequency policy gives ragged ranks, some 0."""
    number = getattr(config, "num_local_experts", None) or config.num_experts
    block = "block_sparse_moe" if config.model_type == "mixtral" else "mlp"
    counts = [(7 * expert) % number**2 for expert in range(number)]
    return {f"model.layers.{layer}.{block}.experts": counts for layer in range(config.num_hidden_layers)}


def make_prompts(folder: Path, lengths: tuple[int, ...] = (1, 2, 17, 64, 129, 300)) -> list[list[int]]:
    """Token ids of several lengths: real text where the model has a tokenizer, else random."""
    if (folder / "tokenizer.json").exists():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(TEXT.read_text(encoding="utf-8")[:20000], add_special_tokens=False)["input_ids"]
        starts = [sum(lengths[:index]) for index in range(len(lengths))]
        return [ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@torch.inference_mode()
def logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    """Return the model's log-probabilities [tokens, vocabulary]."""
    return torch.log_softmax(model(input_ids=torch.tensor([ids], device=model.device)).logits[0].double(), -1).cpu()


class Comparison(NamedTuple):
    """How vLLM's output differs from a Hugging Face model.

    Attributes:
        differences: absolute differences of all prompt log-probabilities.
        shortfalls: by how much each greedy token falls short of the model's best one; 0 where they agree.
    """

    differences: list[float]
    shortfalls: list[float]


def compare(model: Any, prompts: list[list[int]], outputs: list[dict[str, Any]]) -> Comparison:
    """Compare vLLM's prompt log-probabilities and greedy tokens with a Hugging Face model."""
    result = Comparison([], [])
    for prompt, output in zip(prompts, outputs, strict=True):
        generated = output["generated"]
        table = logprobs(model, prompt + generated)
        for position, value in enumerate(output["prompt_logprobs"], start=1):
            result.differences.append(abs(float(table[position - 1, prompt[position]]) - value))
        for step, token in enumerate(generated):
            row = table[len(prompt) + step - 1]
            result.shortfalls.append(float(row.max() - row[token]))
    return result
