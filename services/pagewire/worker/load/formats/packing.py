"""Codes of a few bits each, taken out of the words and bytes that formats pack them in."""

import torch
from torch import Tensor

BITS_A_WORD = 32
AT_A_TIME = 1 << 22
"""Values that are taken out of words in one go where they straddle words, in int64."""


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """words int32 [R, W], little-endian, each row a stream of codes of `bits` bits (1 to 8), lowest
    first -> uint8 [R, count]."""
    if bits in (1, 2, 4, 8):
        return unpack_bytes(words.contiguous().view(torch.uint8), bits)[:, :count]
    rows = max(1, AT_A_TIME // count)
    return torch.cat([_straddling(part, bits, count) for part in words.split(rows)])


def unpack_bytes(data: Tensor, bits: int) -> Tensor:
    """data uint8 [R, B] -> uint8 [R, B * 8 / bits]: the codes of each byte, lowest first."""
    if bits == 8:
        return data
    shifts = range(0, 8, bits)
    mask = (1 << bits) - 1
    return torch.stack([(data >> shift) & mask for shift in shifts], -1).flatten(1)


def _straddling(words: Tensor, bits: int, count: int) -> Tensor:
    wide = words.long() & 0xFFFF_FFFF
    wide = torch.cat((wide, wide.new_zeros(len(wide), 1)), 1)
    first_bit = torch.arange(count, device=words.device) * bits
    word = first_bit // BITS_A_WORD
    both = wide[:, word] | (wide[:, word + 1] << BITS_A_WORD)
    # A code ends at most 7 bits into the second word, so the sign bit of int64 may be set: the
    # shift then brings ones in from the left, which the mask removes.
    return ((both >> (first_bit % BITS_A_WORD)) & ((1 << bits) - 1)).to(torch.uint8)


def words_for(count: int, bits: int) -> int:
    """Words that a stream of `count` codes takes."""
    return -(-count * bits // BITS_A_WORD)
