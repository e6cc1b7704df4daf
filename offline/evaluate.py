"""Perplexity by the paper's protocol, and expert use, of a source model or a MiLo checkpoint.

Like :mod:`.streamed` it needs transformers: it runs the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from vllm_milo.checkpoint import TENSOR_NAMES, U_SCALE, V_SCALE, MiLoFormat, U, V
from vllm_milo.kernels.packing import dequantize, dequantize_factor
from vllm_milo.shards import TensorEntry, read_json, read_tensors
from vllm_milo.validation import quantized_modules, validate_checkpoint

from .errors import ConversionError
from .families import find_family

WINDOW = 2048
STRIDE = 512
PROTOCOL = "window {window}, stride {stride}, mean of per-window losses over tokens not scored before"


class Perplexity(NamedTuple):
    """A perplexity and how it was measured."""

    perplexity: float
    windows: int
    tokens: int
    protocol: str


def load_model(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """Return the Hugging Face model of a folder; MiLo checkpoints get the weights s·(q - z) + UᵀV.

    Raises:
        ConversionError: transformers has no class for the architecture.
        CheckpointError, ShardError: the MiLo checkpoint is broken.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or ["none"])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise ConversionError(f"{folder}: transformers {transformers.__version__} has no {name}")
    if not getattr(config, "quantization_config", None):
        model = model_class.from_pretrained(folder, dtype=dtype)
    else:
        fmt = validate_checkpoint(folder)
        del config.quantization_config
        state = dict(dequantized_tensors(folder, fmt, dtype))
        model = model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    return model.to(device).eval()


def dequantized_tensors(folder: Path, fmt: MiLoFormat, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of a MiLo checkpoint under its source name, quantized matrices as ``dtype``."""
    from safetensors import safe_open

    entries = read_tensors(folder)
    modules = quantized_modules(entries)
    files = {entry.file for entry in entries.values()}
    handles = {file: safe_open(file, framework="pt") for file in files}

    def load(name: str) -> torch.Tensor:
        return handles[entries[name].file].get_tensor(name)

    for name in entries:
        if name.rpartition(".")[2] not in TENSOR_NAMES:
            yield name, load(name)
    for module, found in modules.items():
        yield f"{module}.weight", _dequantize_matrix(module, found, fmt, load).to(dtype)


def _dequantize_matrix(
    module: str, found: dict[str, TensorEntry], fmt: MiLoFormat, load: Callable[[str], torch.Tensor]
) -> torch.Tensor:
    tensors = {name: load(f"{module}.{name}") for name in found}
    weight = dequantize(tensors["weight_packed"], tensors["weight_scale"], tensors["weight_zero"], fmt.group_size)
    if U not in tensors:
        return weight
    bits = fmt.compensator.bits
    u = dequantize_factor(tensors[U], tensors.get(U_SCALE), bits)
    return weight + u.T @ dequantize_factor(tensors[V], tensors.get(V_SCALE), bits)


def read_tokens(folder: Path, text: Path) -> torch.Tensor:
    """Return the token ids of a text file, by the folder's tokenizer, without special tokens.

    Raises:
        ConversionError: the file cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"{text}: cannot be read as UTF-8 text: {error}") from error
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return torch.tensor(tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"])


def perplexity(
    model: Any,
    tokens: torch.Tensor,
    max_windows: int | None = None,
    window: int = WINDOW,
    stride: int = STRIDE,
    progress: bool = False,
) -> Perplexity:
    """Return the perplexity of a model on token ids, by the paper's protocol.

    Windows of 2048 tokens (or the model's maximum) start every 512; each scores only the tokens that no
    window before it scored, and counts once in the mean.

    Args:
        model: a causal LM of transformers.
        tokens: int64 [tokens].
        max_windows: stop after so many windows.
        window: tokens of a window, at most; the model's maximum caps it.
        stride: tokens between the starts of windows.
        progress: show a progress bar.

    Raises:
        ConversionError: fewer than two tokens, or a window or stride that scores nothing.
    """
    window = min(window, int(model.config.max_position_embeddings))
    if tokens.numel() < 2:
        raise ConversionError("the text has fewer than two tokens; nothing to score")
    if window < 2 or not 0 < stride <= window:
        raise ConversionError(f"window {window} and stride {stride}: need window > 1 and 0 < stride <= window")
    starts = list(range(0, max(1, tokens.numel() - 1), stride))
    losses: list[float] = []
    scored_to = 0
    for start in tqdm(starts[:max_windows], desc="perplexity", unit="window", disable=not progress):
        end = min(start + window, tokens.numel())
        new = end - max(scored_to, start + 1)
        if new <= 0:
            break
        losses.append(_window_loss(model, tokens[start:end], new))
        scored_to = end
    protocol = PROTOCOL.format(window=window, stride=stride)
    return Perplexity(math.exp(sum(losses) / len(losses)), len(losses), scored_to, protocol)


def count_experts_used(model: Any, tokens: torch.Tensor, max_windows: int | None = None) -> dict[str, list[int]]:
    """Return how often the router picks each expert on a text, by experts' name in the checkpoint."""
    family = find_family(model.config.to_dict())
    number = family.num_experts(model.config.to_dict())
    counts: dict[str, torch.Tensor] = {}

    def counter(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            chosen = args[1] if len(args) > 1 else kwargs["top_k_index"]
            counts[name] += torch.bincount(chosen.flatten().cpu(), minlength=number)

        return hook

    hooks = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            experts = family.checkpoint_name(name)
            counts[experts] = torch.zeros(number, dtype=torch.int64)
            hooks.append(module.register_forward_pre_hook(counter(experts), with_kwargs=True))
    window = min(WINDOW, int(model.config.max_position_embeddings))
    try:
        perplexity(model, tokens, max_windows, window=window, stride=window)  # no token counts twice
    finally:
        for handle in hooks:
            handle.remove()
    return {name: count.tolist() for name, count in counts.items()}


def read_expert_counts(path: Path) -> dict[str, list[int]]:
    """Read a file that ``milo stats`` wrote.

    Raises:
        ConversionError: the file is not of that form.
    """
    content = read_json(path)
    counts = content.get("expert_counts") if isinstance(content, dict) else None
    if not isinstance(counts, dict) or not all(isinstance(value, list) for value in counts.values()):
        raise ConversionError(f"{path}: no expert_counts; make it with `milo stats MODEL --text FILE -o {path}`")
    return counts


@torch.inference_mode()
def _window_loss(model: Any, window: torch.Tensor, new: int) -> float:
    ids = window.to(model.device).unsqueeze(0)
    logits = model(input_ids=ids, use_cache=False).logits[0, -new - 1 : -1].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, -new:]))
