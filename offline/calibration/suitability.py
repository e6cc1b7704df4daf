"""Whether a text suits a model: one in a language or an encoding that its tokenizer hardly knows teaches little."""

from __future__ import annotations

from typing import Any

import torch

from .documents import cut_windows, packaged_documents

SAMPLE, USUAL_SAMPLE = 32, 1024
"""Windows of a text that are looked at, and of the package's, whose documents differ much."""
MOST_TOKENS = 1.75
"""Times the tokens for each byte of the text that comes with the package. A tokenizer with little but English takes
1 for each byte of other scripts, twice what it takes for the package's text, a fifth of which is in other languages."""
MOST_UNKNOWN = 0.02
"""Share of tokens that stand for what the tokenizer does not know."""


def doubts(windows: torch.Tensor, tokenizer: Any) -> str | None:
    """Return what seems wrong with a text's windows of token ids [W, T], or None.

    Bytes are counted and not characters, since a Chinese character is worth several letters.
    """
    unknown = _unknown_share(windows, tokenizer)
    if unknown > MOST_UNKNOWN:
        return f"{unknown:.0%} of its tokens stand for what the tokenizer does not know; {_QUESTION}"
    usual = cut_windows(packaged_documents(), tokenizer, USUAL_SAMPLE, windows.shape[1])
    own, theirs = tokens_per_byte(windows[:SAMPLE], tokenizer), tokens_per_byte(usual, tokenizer)
    if own > MOST_TOKENS * theirs:
        return (
            f"the tokenizer takes {own:.2f} tokens for each byte of it, and {theirs:.2f} for the text that comes with "
            f"the package; {_QUESTION}"
        )
    return None


def tokens_per_byte(windows: torch.Tensor, tokenizer: Any) -> float:
    """Return how many token ids stand for a byte of the UTF-8 text of windows [W, T], special tokens left out."""
    special = torch.isin(windows, torch.tensor(tokenizer.all_special_ids, dtype=windows.dtype))
    texts = tokenizer.batch_decode(windows.tolist(), skip_special_tokens=True)
    return int((~special).sum()) / max(1, sum(len(text.encode("utf-8", errors="replace")) for text in texts))


def _unknown_share(windows: torch.Tensor, tokenizer: Any) -> float:
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown == tokenizer.eos_token_id:  # some tokenizers have one token for everything special
        return 0.0
    return float((windows == unknown).float().mean())


_QUESTION = "is it in a language and encoding that the model was trained on?"
