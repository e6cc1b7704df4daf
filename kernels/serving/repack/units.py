"""Codes of the checkpoint layout, and units of 128 on their way to 3 words of each of the 4 lanes that share one."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_codes(row_ptr, column, there):
    """Load 3-bit codes at columns of rows in the checkpoint layout, int32; 0 where ``there`` is off."""
    bit = 3 * column
    shift = bit & 31
    place = row_ptr + (bit >> 5)
    low = tl.load(place, mask=there, other=0).to(tl.uint32, bitcast=True)
    high = tl.load(place + 1, mask=there & (shift > 29), other=0).to(tl.uint32, bitcast=True)
    codes = (low >> shift.to(tl.uint32)) | (high << ((32 - shift) & 31).to(tl.uint32))
    return (codes & 7).to(tl.int32)


@triton.jit
def _load_word(row_ptr, word, num_words, valid):
    """Load one word of every row, 0 beyond the row's end and in rows that are not valid."""
    return tl.load(row_ptr + word, mask=valid & (word < num_words), other=0)


@triton.jit
def _load_eight(row_ptr, first, num_words, valid, QUARTER: tl.constexpr):
    """Load 8 codes of every row, 24 bits: a quarter of the 32 in the three words from ``first`` on."""
    if QUARTER == 0:
        eight = _load_word(row_ptr, first, num_words, valid)
    elif QUARTER == 1:
        eight = (_load_word(row_ptr, first, num_words, valid) >> 24) & 0xFF
        eight |= _load_word(row_ptr, first + 1, num_words, valid) << 8
    elif QUARTER == 2:
        eight = (_load_word(row_ptr, first + 1, num_words, valid) >> 16) & 0xFFFF
        eight |= _load_word(row_ptr, first + 2, num_words, valid) << 16
    else:
        eight = _load_word(row_ptr, first + 2, num_words, valid) >> 8
    return eight & 0xFFFFFF


@triton.jit
def repack_unit(target_ptr, row_ptr, unit, num_words, columns, valid, EMPTY: tl.constexpr, ROWS: tl.constexpr):
    """Store a unit of ROWS rows, int32 [3, ROWS, 4].

    Args:
        target_ptr: where it goes.
        row_ptr: pointers to the rows' first words, [ROWS].
        unit: its number within the rows.
        num_words: words of a row.
        columns: codes of a row, a multiple of 8.
        valid: which rows there are, bool [ROWS].
        EMPTY: eight codes, 24 bits, that stand in rows that are not valid; beyond ``columns`` codes are 0 in all.
        ROWS: rows of a block.
    """
    lane = tl.arange(0, 4)
    word0 = tl.zeros((ROWS, 4), tl.int32)
    word1 = tl.zeros((ROWS, 4), tl.int32)
    word2 = tl.zeros((ROWS, 4), tl.int32)
    for half in tl.static_range(2):
        for pair in tl.static_range(8):
            eight = _load_eight(row_ptr, unit * 12 + half * 6 + pair // 4 * 3, num_words, valid, pair % 4)
            if EMPTY:
                inside = unit * 128 + half * 64 + pair * 8 < columns
                eight = tl.where(valid, eight, tl.where(inside, EMPTY, 0))
            codes = eight[:, None] >> (6 * lane)[None, :]
            two = (codes & 7) | ((codes >> 3 & 7) << 16)
            if half == 1 and pair == 7:  # one bit to the spare bits of each word
                word0 |= (two & 0x00010001) << 15
                word1 |= (two >> 1 & 0x00010001) << 15
                word2 |= (two >> 2 & 0x00010001) << 15
            elif half == 1 and pair == 6:
                word2 |= two << 12
            elif pair % 3 == 0:
                word0 |= two << 3 * (pair // 3 * 2 + half)
            elif pair % 3 == 1:
                word1 |= two << 3 * (pair // 3 * 2 + half)
            else:
                word2 |= two << 3 * (pair // 3 * 2 + half)
    place = target_ptr + tl.arange(0, ROWS)[:, None] * 4 + lane[None, :]
    tl.store(place, word0)
    tl.store(place + ROWS * 4, word1)
    tl.store(place + ROWS * 8, word2)
