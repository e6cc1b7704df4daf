"""Which models and texts can be compared: a candidate and its reference, to be run by layers, and their windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_milo.shards import read_json
from vllm_milo.validation import validate_checkpoint

from ..checkpoint.dequantize import dequantizing_load
from ..errors import ConversionError
from ..source.families import find_family
from ..source.reader import ModelReader
from ..source.streamed_model import StreamedModel, reader_tensors
from ..source.tokens import load_tokenizer, read_text, tokenize

WINDOW = 512
"""Most tokens of a window, by default."""
_ALIKE = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")
"""Keys of config.json that two models must share to be compared."""
_ADVICE = "only models that transformers runs can be compared"


@dataclass(frozen=True)
class Options:
    """How models are compared.

    Attributes:
        window: tokens of a window, at most; the maximum of either model caps it.
        max_windows: windows of each text, at most.
        device: where layers run.
        dtype: of weights and hidden states; logits are float32.
        progress: show a progress bar.
    """

    window: int = WINDOW
    max_windows: int | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    progress: bool = False


class Pair(NamedTuple):
    """Two models of one architecture and vocabulary, and the most tokens that both take at once."""

    candidate: StreamedModel
    reference: StreamedModel
    max_length: int


def open_pair(candidate: Path, reference: Path, device: torch.device, dtype: torch.dtype) -> Pair:
    """Return a candidate and its reference, checked against each other; no weights are loaded.

    Raises:
        ConversionError: no such folder, a reference that is quantized, or models that differ in architecture,
            number of layers, hidden size or vocabulary.
        CheckpointError, ShardError: the files of one are broken.
    """
    configs = _read_config(candidate), _read_config(reference)
    if configs[1].get("quantization_config"):
        raise ConversionError(
            f"{reference}: the reference is quantized; give the original model as --reference, and this one as MODEL"
        )
    for key in _ALIKE:
        mine, other = (config.get(key) for config in configs)
        if mine != other:
            raise ConversionError(
                f"{candidate / 'config.json'}: {key} is {mine}, but {other} in {reference}; give as --reference the "
                f"model that this one was made from"
            )
    lengths = [int(config.get("max_position_embeddings") or WINDOW) for config in configs]
    streamed = [open_streamed(folder, device, dtype) for folder in (candidate, reference)]
    return Pair(streamed[0], streamed[1], min(lengths))


def open_streamed(folder: Path, device: torch.device, dtype: torch.dtype) -> StreamedModel:
    """Return an unquantized model or a MiLo checkpoint, to be run a layer at a time.

    Raises:
        ConversionError: no such folder, a quantization other than MiLo's, or a model that transformers cannot run.
        CheckpointError, ShardError: the files are broken.
    """
    config = _read_config(folder)
    if config.get("quantization_config"):
        load = dequantizing_load(folder, validate_checkpoint(folder), dtype, device)
        return StreamedModel(folder, find_family(config), load, device, dtype, _ADVICE)
    reader = ModelReader(folder)
    return StreamedModel(folder, reader.family, reader_tensors(reader.load, reader.tensors), device, dtype, _ADVICE)


def read_windows(
    candidate: Path, reference: Path, texts: Sequence[Path], length: int, limit: int | None
) -> list[torch.Tensor]:
    """Return the disjoint windows of each text in the reference's tokens, int64 [W, ``length``]; its rest is dropped.

    Args:
        candidate: whose tokenizer must make the same tokens of each text.
        reference: whose tokenizer is used.
        texts: UTF-8 files.
        length: tokens of a window.
        limit: windows of a text, at most.

    Raises:
        ConversionError: a folder has no tokenizer, the tokenizers differ on a text, or a text cannot be read, is
            empty, or does not fill a window.
    """
    tokenizers = load_tokenizer(candidate), load_tokenizer(reference)
    windows = []
    for text in texts:
        content = read_text(text)
        if not content.strip():
            raise ConversionError(f"{text}: is empty; give a text of at least {length} tokens")
        other, tokens = (tokenize(tokenizer, content) for tokenizer in tokenizers)
        _check_same(tokens, other, candidate, reference, text)
        windows.append(_cut(tokens, text, length, limit))
    return windows


def check_options(options: Options, texts: Sequence[Path]) -> None:
    """Refuse options that leave nothing to compare.

    Raises:
        ConversionError: names the option.
    """
    if not texts:
        raise ConversionError("no text to compare on; give --text FILE")
    if options.max_windows is not None and options.max_windows < 1:
        raise ConversionError(f"--max-windows {options.max_windows}: must be at least 1")
    if options.window < 2:
        raise ConversionError(f"--window {options.window}: must be at least 2, since the first token is not scored")


def _read_config(folder: Path) -> Mapping[str, Any]:
    if not folder.is_dir():
        raise ConversionError(f"{folder}: no such folder; download or convert the model first")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ConversionError(f"{folder / 'config.json'}: is not a JSON object; is this a Hugging Face model folder?")
    return config


def _check_same(mine: torch.Tensor, other: torch.Tensor, candidate: Path, reference: Path, text: Path) -> None:
    """Refuse different tokens of a text: ``mine`` are the reference's, ``other`` the candidate's, int64 [tokens]."""
    if torch.equal(mine, other):
        return
    shared = min(len(mine), len(other))
    different = (mine[:shared] != other[:shared]).nonzero()
    place = int(different[0]) if len(different) else shared
    raise ConversionError(
        f"{candidate}: its tokenizer differs from that of {reference}, first at token {place} of {text}; give as "
        f"--reference the model that this one was made from, or restore the tokenizer's files"
    )


def _cut(tokens: torch.Tensor, text: Path, length: int, limit: int | None) -> torch.Tensor:
    """Return windows int64 [W, ``length``] of tokens int64 [tokens]."""
    number = len(tokens) // length
    if number == 0:
        raise ConversionError(
            f"{text}: has {len(tokens)} tokens, and a window takes {length}; give a longer text or a smaller --window"
        )
    number = number if limit is None else min(number, limit)
    return tokens[: number * length].view(number, length)
