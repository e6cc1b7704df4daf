"""Integers in 32-bit words: as compressed-tensors packs them, and back."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from vllm_milo.kernels.integers import pack_integers, pack_words, unpack_integers, unpack_words


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("columns", [1, 9, 10, 11, 64, 128])
def test_words_are_those_of_compressed_tensors(bits: int, columns: int):
    codes = torch.randint(0, 2**bits, (5, columns), dtype=torch.uint8)
    words = pack_words(codes, bits)
    assert torch.equal(words, pack_to_int32((codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8), bits))
    assert torch.equal(unpack_words(words, bits, columns), codes)


def test_many_matrices_are_packed_at_once():
    codes = torch.randint(0, 8, (2, 3, 25), dtype=torch.uint8)
    words = pack_words(codes, 3)
    assert torch.equal(words, torch.stack([pack_words(each, 3) for each in codes]))
    assert torch.equal(unpack_words(words, 3, 25), codes)


@pytest.mark.parametrize("bits", [8, 4])
def test_packing_is_undone_and_is_that_of_other_makers(bits: int):
    values = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 64))
    assert torch.equal(unpack_integers(pack_integers(values, bits), bits).long(), values)
    first = pack_integers(torch.tensor([[-(2 ** (bits - 1)) + 1] + [-(2 ** (bits - 1))] * (32 // bits - 1)]), bits)
    assert first.tolist() == [[1]]  # the first value lies in the lowest bits, and the lowest value is 0


def test_values_that_fill_no_word_are_refused():
    with pytest.raises(ValueError, match="not a multiple of 8"):
        pack_integers(torch.zeros(1, 12, dtype=torch.int8), 4)
