"""How far a model's predictions are from those of the model that it was made of: KL divergence and top-1 agreement.

Both models go through the text side by side, one decoder layer of each in memory at a time, so that neither ever has to
fit as a whole. What is held are the hidden states of all windows.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy

from vllm_milo.shards import read_json
from vllm_milo.validation import validate_checkpoint

from ..checkpoint.dequantize import DequantizedTensors
from ..checkpoint.output import is_milo_checkpoint
from ..errors import ConversionError
from ..progress import progress_bar
from ..source.families import find_family
from ..source.reader import ModelReader
from ..source.streamed_model import StreamedModel, reader_tensors
from ..source.tokens import load_tokenizer, read_text

BATCH = 8
"""Windows that go through a layer at once."""
_ALIKE = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")


class Divergence(NamedTuple):
    """What a model makes of a text beside its reference.

    Attributes:
        kl: mean KL divergence of the model's predictions from the reference's, nats a token.
        top1: share of the tokens at which both find the same next token the likeliest.
        perplexity: of the model, over all tokens of a window but the first.
        reference_perplexity: of the reference.
        windows: number of windows.
        tokens: of all windows.
    """

    kl: float
    top1: float
    perplexity: float
    reference_perplexity: float
    windows: int
    tokens: int


def open_streamed(folder: Path, device: torch.device, dtype: torch.dtype) -> StreamedModel:
    """Return a source model or a MiLo checkpoint that runs a layer at a time.

    Raises:
        ConversionError, CheckpointError, ShardError: the folder holds no model, or a broken one.
    """
    if is_milo_checkpoint(folder):
        tensors = DequantizedTensors(folder, validate_checkpoint(folder), dtype)
        return StreamedModel(folder, find_family(read_json(folder / "config.json")), tensors.load, device, dtype)
    reader = ModelReader(folder)
    return StreamedModel(folder, reader.family, reader_tensors(reader.load, reader.tensors), device, dtype)


def refuse_strangers(model: Path, reference: Path) -> None:
    """Refuse a reference that the model was not made of.

    Raises:
        ConversionError: the reference is quantized, or its sizes differ; names the key of config.json.
    """
    if is_milo_checkpoint(reference):
        raise ConversionError(f"--reference {reference}: is a MiLo checkpoint; give the model that it was made of")
    mine, theirs = (read_json(folder / "config.json") for folder in (model, reference))
    for key in _ALIKE:
        if mine.get(key) != theirs.get(key):
            raise ConversionError(
                f"--reference {reference}: {key} is {theirs.get(key)!r} there and {mine.get(key)!r} in {model}; "
                f"give the model that it was made of"
            )


def text_windows(model: Path, reference: Path, text: Path, length: int, most: int | None) -> torch.Tensor:
    """Return disjoint windows of a text by the reference's tokenizer, int64 [W, T].

    Raises:
        ConversionError: the text cannot be read or has less than two tokens, there is no tokenizer, or the model's own
            tokenizer reads the text otherwise.
    """
    content = read_text(text)
    ids, own = (
        load_tokenizer(folder)(content, add_special_tokens=False, verbose=False)["input_ids"]
        for folder in (reference, model)
    )
    if ids != own:
        raise ConversionError(f"{text}: the tokenizers of {model} and {reference} read it as different tokens")
    if len(ids) < 2:
        raise ConversionError(f"{text}: has {len(ids)} tokens; nothing to score")
    length = min(length, len(ids))
    number = min(len(ids) // length, most or len(ids))
    return torch.tensor(ids[: number * length]).view(number, length)


@torch.no_grad()
def divergence(
    model: StreamedModel, reference: StreamedModel, windows: torch.Tensor, progress: bool = False
) -> Divergence:
    """Return how far a model is from its reference on windows of token ids, int64 [W, T].

    Raises:
        ConversionError: a token id lies outside the embedding, or the hidden states are not finite.
    """
    mine, theirs = model.begin(windows), reference.begin(windows)
    for index in progress_bar(range(len(model)), "evaluate", progress):
        mine, theirs = (_through(one, index, states) for one, states in ((model, mine), (reference, theirs)))
    head, other = model.head(), reference.head()
    sums = torch.zeros(4, dtype=torch.float64)
    for window, left, right in zip(windows, mine, theirs, strict=True):
        sums += _scores(head(left), other(right), window.to(model.device)).double().cpu()
    number, tokens = len(windows), windows.numel()
    if not torch.isfinite(sums).all():
        raise ConversionError("the predictions are not finite; is one of the models broken, or --dtype too narrow?")
    kl, top1, loss, reference_loss = (sums / number).tolist()
    return Divergence(kl, top1, math.exp(loss), math.exp(reference_loss), number, tokens)


def _through(model: StreamedModel, index: int, states: torch.Tensor) -> torch.Tensor:
    module = model.layer(index)
    states = model.advance(index, module, states, BATCH)
    model.drop(module)
    return states


def _scores(logits: torch.Tensor, wanted: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the means over one window's tokens of KL divergence, agreement, loss and the reference's loss, [4]."""
    found, target = logits.log_softmax(-1), wanted.log_softmax(-1)
    kl = (target.exp() * (target - found)).sum(-1).mean()
    top1 = (found.argmax(-1) == target.argmax(-1)).float().mean()
    losses = [cross_entropy(values[:-1], ids[1:]) for values in (logits, wanted)]
    return torch.stack([kl, top1, *losses])
