"""A tokenizer of so many words, for models with dummy weights: a server and its clients want one."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

UNKNOWN = "<unknown-word>"
"""The longest token. vLLM refuses prompts of more characters than its longest token times the tokens that a prompt may
have, and takes no account of the spaces that are between words here."""


def write_tokenizer(folder: Path, words: int) -> None:
    """Write a tokenizer whose tokens are the words ``w0``, ``w1``, … apart from the first three, which are special."""
    special = [UNKNOWN, "<s>", "</s>"]
    vocabulary = {word: index for index, word in enumerate([*special, *(f"w{index}" for index in range(3, words))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=special[0], bos_token=special[1], eos_token=special[2]
    ).save_pretrained(folder)
