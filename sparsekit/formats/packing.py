"""Small integers packed into int32 words, and back; on any device.

Thirty-two consecutive codes fill `bits` words as one little-endian bit stream; at 3 bits the 11th
and the 22nd code straddle two words. At 2, 4 and 8 bits that is the same as filling word by word.

Source: AutoGPTQ 0.7.1 `qlinear_cuda_old.py` (pack, forward).
"""

from __future__ import annotations

from functools import reduce
from operator import or_

import torch
from torch import Tensor

BYTE = 8
WORD = 32  # bits of a word, and codes of a packing unit


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """Pack each row into words, low bits first.

    Args:
        values: Integers in 0..2^bits-1, [rows, n], n a multiple of 32.
    Returns:
        int32 [rows, n * bits / 32].
    """
    if BYTE % bits == 0:  # by bytes, which is the same on little-endian machines and many times faster
        codes = values.to(torch.uint8).reshape(len(values), -1, BYTE // bits)
        parts = [codes[..., place] << bits * place for place in range(BYTE // bits)]
        return reduce(or_, parts).contiguous().view(torch.int32)
    units = values.to(torch.int32).reshape(len(values), -1, WORD)  # [rows, n/32, 32]
    words = torch.zeros(*units.shape[:2], bits, dtype=torch.int32, device=values.device)
    for code, word, shift in _places(bits):
        part = units[..., code]
        words[..., word] |= part << shift if shift >= 0 else part >> -shift
    return words.flatten(1)


def unpack_rows(words: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_rows`: int32 [rows, n * bits / 32] to int32 [rows, n]."""
    if BYTE % bits == 0:
        held = words.contiguous().view(torch.uint8)  # [rows, n * bits / 8]
        codes = torch.stack([held >> bits * place & 2**bits - 1 for place in range(BYTE // bits)], 2)
        return codes.flatten(1).int()
    units = words.reshape(len(words), -1, bits)  # [rows, n/32, bits]
    values = torch.zeros(*units.shape[:2], WORD, dtype=torch.int32, device=words.device)
    for code, word, shift in _places(bits):
        part = units[..., word]
        if shift >= 0:
            # A right shift of int32 copies the sign bit downwards; only the bits that came from the word may stay.
            own = 2 ** min(bits, WORD - shift) - 1
            values[..., code] |= (part >> shift) & own
        else:
            values[..., code] |= (part << -shift) & (2**bits - 1)
    return values.flatten(1)


def _places(bits: int) -> list[tuple[int, int, int]]:
    """Where the 32 codes of a unit lie: (code, word, left shift); a code that straddles two words is listed twice.

    A negative shift drops that many low bits, which the word before holds.
    """
    places = []
    for code in range(WORD):
        first, last = code * bits // WORD, (code * bits + bits - 1) // WORD
        places += [(code, word, code * bits - word * WORD) for word in range(first, last + 1)]
    return places


def pack_padded(values: Tensor, bits: int) -> Tensor:
    """Pack rows of any length, the last word filled with zeros; `bits` divides 32.

    Returns:
        int32 [rows, ceil(n * bits / 32)].
    """
    count = values.shape[1]
    padded = torch.nn.functional.pad(values, (0, -count % WORD))
    return pack_rows(padded, bits)[:, : -(-count * bits // WORD)].contiguous()


def unpack_padded(words: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_padded`: int32 [rows, count]."""
    padded = torch.nn.functional.pad(words, (0, -words.shape[1] % bits))
    return unpack_rows(padded, bits)[:, :count]
