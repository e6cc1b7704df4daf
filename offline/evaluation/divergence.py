"""How far a model's predictions are from those of the model that it was made of: KL divergence and top-1 agreement.

Both models go through the texts side by side, one decoder layer in memory at a time, so that neither ever has to fit as
a whole. What is held are the hidden states of all windows, on the host where they would fill the device. Logits are
made of a few positions at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from vllm_milo.validation import validate_checkpoint
from vllm_milo.values import shown

from ..checkpoint.dequantize import DequantizedTensors
from ..checkpoint.output import is_milo_checkpoint
from ..errors import ConversionError
from ..families.find import find_family
from ..progress import progress_bar
from ..source.config import read_settings, read_text_settings
from ..source.reader import ModelReader
from ..source.states import StatesHome
from ..source.streamed_model import StreamedModel, reader_tensors
from ..source.tokens import check_known, load_tokenizer, read_text
from .router_choices import changed_choices, router_choices

BATCH = 8
"""Windows that go through a layer at once."""
LOGITS = 2**25
"""Numbers in one model's logits that are scored at once, at most; about six float32 copies of them are held."""
STATES_SHARE = 0.25
"""Of a GPU's free memory that the hidden states of both models may take; more of them are kept on the host."""
_ADVICE = "only models that transformers runs can be compared"
_ALIKE = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")


Head = Callable[[torch.Tensor], torch.Tensor]
"""Makes logits, float32 [n, V], of hidden states [n, H]."""


class Divergence(NamedTuple):
    """What a model makes of a text beside its reference.

    Attributes:
        kl: mean KL divergence of the model's predictions from the reference's, nats a token.
        top1: share of the tokens at which both find the same next token the likeliest.
        perplexity: of the model, over all tokens of a window but the first.
        reference_perplexity: of the reference.
        windows: number of windows.
        tokens: of all windows.
        router_flips: share of the tokens that the two send to different sets of experts, mean over the layers that
            route; None where none does or it cannot be told.
    """

    kl: float
    top1: float
    perplexity: float
    reference_perplexity: float
    windows: int
    tokens: int
    router_flips: float | None = None


def open_streamed(folder: Path, device: torch.device, dtype: torch.dtype) -> StreamedModel:
    """Return a source model or a MiLo checkpoint that runs a layer at a time.

    Raises:
        ConversionError, CheckpointError, ShardError: the folder holds no model, or a broken one.
    """
    if is_milo_checkpoint(folder):
        tensors = DequantizedTensors(folder, validate_checkpoint(folder), dtype, device)
        family = find_family(read_settings(folder))
        return StreamedModel(folder, family, tensors.load, device, dtype, _ADVICE)
    reader = ModelReader(folder)
    load = reader_tensors(partial(reader.load, device=device), reader.tensors)
    return StreamedModel(folder, reader.family, load, device, dtype, _ADVICE)


def refuse_strangers(model: Path, reference: Path) -> None:
    """Refuse a reference that the model was not made of.

    Raises:
        ConversionError: no such folder, the reference is quantized, or its sizes differ; names the key of config.json.
    """
    for folder in (model, reference):
        if not folder.is_dir():
            raise ConversionError(f"{folder}: no such folder; download or convert the model first")
    if is_milo_checkpoint(reference):
        instead = "; give the model that it was made of"
        if not is_milo_checkpoint(model):
            instead = f", and {model} is none; exchange the two: the reference is the model that it was made of"
        raise ConversionError(f"--reference {reference}: is a MiLo checkpoint{instead}")
    mine, theirs = (read_text_settings(folder) for folder in (model, reference))
    for key in _ALIKE:
        if mine.get(key) != theirs.get(key):
            there, here = shown(theirs.get(key)), shown(mine.get(key))
            raise ConversionError(
                f"--reference {reference}: {key} is {there} there and {here} in {model}; give the model that it was "
                f"made of"
            )


def text_windows(model: Path, reference: Path, text: Path, length: int, most: int | None) -> torch.Tensor:
    """Return disjoint windows of a text by the reference's tokenizer, int64 [W, T]; what fills none is dropped.

    Args:
        model: whose tokenizer must read the text as the same tokens.
        reference: whose tokenizer is used.
        text: a UTF-8 file.
        length: tokens of a window, capped at the maximum that config.json states for either model.
        most: windows, at most.

    Raises:
        ConversionError: the text cannot be read or does not fill a window, a window scores nothing, there is no
            tokenizer, or the model's own tokenizer reads the text otherwise.
    """
    if length < 2:
        raise ConversionError(f"--window {length}: must be at least 2, since the first token is not predicted")
    for folder in (model, reference):
        length = min(length, read_text_settings(folder).get("max_position_embeddings") or length)
    content = read_text(text)
    ids, own = (
        load_tokenizer(folder)(content, add_special_tokens=False, verbose=False)["input_ids"]
        for folder in (reference, model)
    )
    if ids != own:
        raise ConversionError(
            f"{text}: the tokenizers of {model} and {reference} read it as different tokens; give the model that it "
            f"was made of, or copy the tokenizer's files again"
        )
    if len(ids) < length:
        raise ConversionError(
            f"{text}: has {len(ids)} tokens, and a window takes {length}; give a longer text or a smaller --window"
        )
    number = min(len(ids) // length, most or len(ids))
    windows = torch.tensor(ids[: number * length]).view(number, length)
    check_known(windows, reference)
    return windows


def divergence(
    model: StreamedModel, reference: StreamedModel, windows: torch.Tensor, progress: bool = False
) -> Divergence:
    """Return how far a model is from its reference on one text; see :func:`divergences`."""
    return divergences(model, reference, [windows], progress)[0]


@torch.no_grad()
def divergences(
    model: StreamedModel, reference: StreamedModel, texts: Sequence[torch.Tensor], progress: bool = False
) -> list[Divergence]:
    """Return how far a model is from its reference on each text, in one pass through the layers.

    Args:
        model: what is measured.
        reference: what it was made of, on the same device and in the same dtype.
        texts: windows of token ids, int64 [W, T] of each text, T the same for all.
        progress: show a progress bar.

    Raises:
        ConversionError: a token id lies outside the embedding, a layer's tensors are not what transformers needs, or
            the predictions are not finite.
    """
    windows = torch.cat(list(texts))
    home = StatesHome(states_device(model, windows))
    pair = [(one, one.begin(windows, home)) for one in (model, reference)]
    flips: list[torch.Tensor] = []
    for index in progress_bar(range(len(model)), "evaluate", progress):
        mine, theirs = (_advance_in_place(one, index, states) for one, states in pair)
        changed = changed_choices(mine, theirs, len(windows))
        flips += [] if changed is None else [changed]
    heads, step = (model.head(), reference.head()), max(1, LOGITS // model.vocabulary)
    held = zip(windows.to(model.device), *(states for _, states in pair), strict=True)
    scores = torch.stack([_scores(heads, states, ids, step) for ids, *states in held]).cpu()
    if not torch.isfinite(scores).all():
        raise ConversionError(
            f"the predictions of {model.folder} beside {reference.folder} are not finite in {model.dtype}; is one of "
            f"them broken, or --dtype too narrow?"
        )
    sizes = [len(text) for text in texts]
    found = [_summary(part, windows.shape[1]) for part in scores.split(sizes)]
    if not flips:
        return found
    of_texts = torch.stack(flips).mean(0).split(sizes)
    return [one._replace(router_flips=float(part.mean())) for one, part in zip(found, of_texts, strict=True)]


def states_device(model: StreamedModel, windows: torch.Tensor) -> torch.device:
    """Return where the hidden states of two models are kept: on their GPU where these take little of it, else the host.

    Args:
        model: one of the two.
        windows: int64 [W, T].
    """
    if model.device.type != "cuda":
        return torch.device("cpu")
    need = 2 * windows.numel() * model.hidden_size * model.dtype.itemsize
    free, _ = torch.cuda.mem_get_info(model.device)
    return model.device if need <= STATES_SHARE * free else torch.device("cpu")


def _advance_in_place(model: StreamedModel, index: int, states: torch.Tensor) -> list[torch.Tensor]:
    """Load a layer, put what it makes of the hidden states [W, T, H] in their place, and free it.

    Returns:
        Its tokens' experts; see :func:`router_choices`.
    """
    module = model.layer(index)
    with router_choices(module, states.device) as choices:
        for part in states.split(BATCH):
            part.copy_(model.run(index, module, part))
    model.drop(module)
    return choices


def _scores(heads: Sequence[Head], states: Sequence[torch.Tensor], ids: torch.Tensor, step: int) -> torch.Tensor:
    """Return a window's KL divergence, agreement, loss and the reference's loss, means over tokens, float64 [4].

    Args:
        heads: the model's and the reference's.
        states: the model's and the reference's after the last layer, [T, H] each.
        ids: the window's tokens, int64 [T], where the heads are.
        step: positions at a time.
    """
    total = torch.zeros(4, dtype=torch.float64, device=ids.device)
    for start in range(0, len(ids), step):
        parts = (held[start : start + step].to(ids.device) for held in states)
        found, wanted = (head(part).log_softmax(-1) for head, part in zip(heads, parts, strict=True))
        following = ids[start + 1 : start + step + 1]  # of the last position none is known
        rows = [(wanted.exp() * (wanted - found)).sum(-1), (found.argmax(-1) == wanted.argmax(-1)).float()]
        rows += [-table[: len(following)].gather(1, following[:, None])[:, 0] for table in (found, wanted)]
        total += torch.stack([row.double().sum() for row in rows])
    return total / torch.tensor([len(ids)] * 2 + [len(ids) - 1] * 2, device=ids.device)


def _summary(scores: torch.Tensor, length: int) -> Divergence:
    """Return the means over windows of ``length`` tokens, of their scores float64 [W, 4]."""
    kl, top1, loss, reference_loss = scores.mean(0).tolist()
    number = len(scores)
    return Divergence(kl, top1, math.exp(loss), math.exp(reference_loss), number, number * length)
