"""How far a model has moved from its reference on a text: KL divergence, agreement and both perplexities.

The two models go side by side through the windows of all texts, one decoder layer in memory at a time, first the
reference's and then the candidate's; what stays is the hidden states of both. Logits are made of a few positions at a
time, and are gone once they are scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import ConversionError
from ..progress import progress_bar
from ..source.streamed_model import StreamedModel
from .comparison import Options, Pair, check_options, open_pair, read_windows

BATCH = 8
"""Windows that go through a layer at once."""
LOGITS = 2**25
"""Numbers in the logits that are scored at once, at most; about six float32 copies of them are held."""
STATES_SHARE = 0.25
"""Of a GPU's free memory that hidden states may take; more of them are kept on the host."""


Head = Callable[[torch.Tensor], torch.Tensor]
"""Makes logits, float32 [n, V], of hidden states [n, H]."""


class Divergence(NamedTuple):
    """What a text says of a candidate and its reference.

    Attributes:
        text: the file.
        kl: KL divergence of the candidate from the reference, mean over tokens, nats a token.
        top1: share of tokens where both find the same token the likeliest.
        perplexity: of the candidate.
        reference_perplexity: of the reference.
        windows: number of windows.
        tokens: number of tokens scored: all but the first of each window.
    """

    text: str
    kl: float
    top1: float
    perplexity: float
    reference_perplexity: float
    windows: int
    tokens: int


class Scores(NamedTuple):
    """Means over the scored tokens of each window, float64 [W] on the CPU.

    Attributes:
        kl: KL divergence of the candidate from the reference, nats a token.
        top1: share of tokens where both find the same token the likeliest.
        loss: of the candidate, nats a token.
        reference_loss: of the reference, nats a token.
    """

    kl: torch.Tensor
    top1: torch.Tensor
    loss: torch.Tensor
    reference_loss: torch.Tensor


def compare(candidate: Path, reference: Path, texts: Sequence[Path], options: Options) -> list[Divergence]:
    """Return what each text says of a candidate and its reference, in the order of the texts.

    Args:
        candidate: folder of a MiLo checkpoint or of an unquantized model.
        reference: folder of the unquantized model that it was made from.
        texts: UTF-8 files.
        options: window, number of windows, device, dtype.

    Raises:
        ConversionError: the models, or the texts, cannot be compared, or logits hold NaN or Inf.
        CheckpointError, ShardError: the files of a model are broken.
    """
    check_options(options, texts)
    pair = open_pair(candidate, reference, torch.device(options.device), options.dtype)
    length = min(options.window, pair.max_length)
    windows = read_windows(candidate, reference, texts, length, options.max_windows)
    scores = window_scores(pair, torch.cat(windows), progress=options.progress)
    parts = zip(*(values.split([len(part) for part in windows]) for values in scores), strict=True)
    return [_summary(text, Scores(*part), length) for text, part in zip(texts, parts, strict=True)]


@torch.no_grad()
def window_scores(pair: Pair, windows: torch.Tensor, batch: int = BATCH, progress: bool = False) -> Scores:
    """Return the scores of windows of token ids int64 [W, T], ``batch`` windows at a time.

    Raises:
        ConversionError: a token id lies outside an embedding, a layer's tensors are not what transformers needs, or
            logits hold NaN or Inf.
    """
    models = pair.reference, pair.candidate
    home = states_home(pair.reference, windows)
    states = [model.begin(windows, home) for model in models]
    for index in progress_bar(range(len(pair.reference)), "compare", progress):
        for model, held in zip(models, states, strict=True):
            advance_in_place(model, index, held, batch)
    return _score(pair, states[0], states[1], windows)


def states_home(model: StreamedModel, windows: torch.Tensor) -> torch.device:
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


def advance_in_place(model: StreamedModel, index: int, states: torch.Tensor, batch: int) -> None:
    """Load a layer, put what it makes of the hidden states [W, T, H] in their place, and free it."""
    module = model.layer(index)
    for part in states.split(batch):
        part.copy_(model.run(index, module, part.to(model.device)))
    model.drop(module)


def _score(pair: Pair, reference: torch.Tensor, candidate: torch.Tensor, windows: torch.Tensor) -> Scores:
    """Return the scores of windows int64 [W, T] from both models' hidden states [W, T, H] after the last layer."""
    heads = pair.reference.head(), pair.candidate.head()
    windows = windows.to(pair.reference.device)
    step = max(1, LOGITS // pair.reference.vocabulary)
    rows = [_score_window(heads, states, ids, step) for *states, ids in zip(reference, candidate, windows, strict=True)]
    scores = Scores(*torch.stack(rows, dim=1).cpu())
    _check_finite(pair, scores)
    return scores


def _score_window(heads: Sequence[Head], states: Sequence[torch.Tensor], ids: torch.Tensor, step: int) -> torch.Tensor:
    """Return the four scores of a window, float64 [4], a few positions at a time.

    Args:
        heads: the reference's and the candidate's.
        states: the reference's and the candidate's after the last layer, [T, H] each.
        ids: of the window's tokens, int64 [T], where the heads are.
        step: positions at a time.
    """
    scored = len(ids) - 1
    total = torch.zeros(len(Scores._fields), dtype=torch.float64, device=ids.device)
    for start in range(0, scored, step):
        stop = min(start + step, scored)
        parts = (held[start:stop].to(ids.device) for held in states)
        before, after = (head(part).log_softmax(-1) for head, part in zip(heads, parts, strict=True))
        total += _score_tokens(before, after, ids[start + 1 : stop + 1]).double().sum(1)
    return total / scored


def _score_tokens(reference: torch.Tensor, candidate: torch.Tensor, next_ids: torch.Tensor) -> torch.Tensor:
    """Return KL divergence, agreement and both losses of each token, float32 [4, n].

    Args:
        reference: log-probabilities, float32 [n, V].
        candidate: the same of the candidate.
        next_ids: the tokens that follow, int64 [n].
    """
    kl = (reference.exp() * (reference - candidate)).sum(-1)
    same = (reference.argmax(-1) == candidate.argmax(-1)).float()
    losses = [-table.gather(1, next_ids[:, None])[:, 0] for table in (candidate, reference)]
    return torch.stack([kl, same, *losses])


def _check_finite(pair: Pair, scores: Scores) -> None:
    for model, losses in ((pair.reference, scores.reference_loss), (pair.candidate, scores.loss + scores.kl)):
        if not torch.isfinite(losses).all():
            raise ConversionError(
                f"{model.folder}: logits hold NaN or Inf in {model.dtype}; use another --dtype, or copy the model again"
            )


def _summary(text: Path, scores: Scores, length: int) -> Divergence:
    """Return the means over windows, which are all of ``length`` tokens."""
    kl, top1, loss, reference_loss = (float(values.mean()) for values in scores)
    number = len(scores.kl)
    return Divergence(str(text), kl, top1, math.exp(loss), math.exp(reference_loss), number, number * (length - 1))
