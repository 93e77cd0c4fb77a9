"""A matrix of small numbers as bytes that tell all about themselves: coded with rANS, or packed where that is smaller.

Little-endian, in this order:

- rows and columns, uint32 each; of the alphabet: its first number, the distance to the next one, and its size
  minus 1, uint8 each; the kind, uint8: 0 packed, 1 coded;
- packed: for every number its index in the alphabet, in as many bits as the last index has, at least one, as
  one bit stream;
- coded: the chances of every number of the alphabet out of 2^14, uint16 each; how many words there are, uint32; a
  state for each lane, uint32; the words, uint16 (see rans.py).

So odd numbers, or the few high bytes of floats, are told by an alphabet of as many numbers as there are. A stream
holds at most 8 numbers a byte packed and 512 coded, since a lane has four bytes and 2048 symbols: what a
file makes a reader allocate is bounded by its own size.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from sparsekit.errors import CheckpointError
from sparsekit.formats.rans import TOTAL, decode, encode, frequencies, lanes_of

Bytes = npt.NDArray[np.uint8]

HEADER = struct.Struct("<IIBBBB")
PACKED, CODED = 0, 1


def written(matrix: Bytes) -> Bytes:
    """A matrix as a stream, of the kind that takes less.

    Args:
        matrix: uint8 [rows, columns], not empty.
    """
    counts = np.bincount(matrix.reshape(-1))
    held = np.flatnonzero(counts)
    first, apart = int(held[0]), int(np.gcd.reduce(np.diff(held))) or 1
    symbols = (matrix.reshape(-1) - np.uint8(first)) // np.uint8(apart)
    counts = counts[first : held[-1] + 1 : apart]
    content, kind = _coded(symbols, counts), CODED
    if content.size >= -(-symbols.size * _width(len(counts)) // 8):
        content, kind = _packed(symbols, len(counts)), PACKED
    header = HEADER.pack(*matrix.shape, first, apart, len(counts) - 1, kind)
    return np.concatenate((np.frombuffer(header, np.uint8), content))


def read(stream: Bytes) -> tuple[Bytes, Bytes]:
    """Inverse of `written`: the matrix, and what lies behind it.

    Raises:
        CheckpointError: No such stream was ever written.
    """
    header, rest = _split(stream, HEADER.size)
    rows, columns, first, apart, last, kind = HEADER.unpack(header.tobytes())
    if not rows * columns:
        raise CheckpointError(f"a stream of {rows} rows of {columns} numbers")
    if not apart or first + apart * last > 255:
        raise CheckpointError(f"numbers from {first} in steps of {apart}, {last} of them, are no bytes")
    if kind not in (PACKED, CODED):
        raise CheckpointError(f"a stream of the unknown kind {kind}")
    symbols, rest = (_read_coded if kind == CODED else _read_packed)(rest, last + 1, rows * columns)
    if symbols.size and int(symbols.max()) > last:
        raise CheckpointError(f"number {int(symbols.max())} of an alphabet of {last + 1}")
    return (symbols * np.uint8(apart) + np.uint8(first)).reshape(rows, columns), rest


def _width(alphabet: int) -> int:
    """Bits of a packed number."""
    return max(1, (alphabet - 1).bit_length())


def _packed(symbols: Bytes, alphabet: int) -> Bytes:
    bits = np.unpackbits(symbols[:, None], axis=1, count=_width(alphabet), bitorder="little")
    return np.packbits(bits, bitorder="little")


def _read_packed(stream: Bytes, alphabet: int, count: int) -> tuple[Bytes, Bytes]:
    width = _width(alphabet)
    held, rest = _split(stream, -(-count * width // 8))
    bits = np.unpackbits(held, count=count * width, bitorder="little").reshape(count, width)
    return np.packbits(bits, axis=1, bitorder="little").reshape(count), rest


def _coded(symbols: Bytes, counts: npt.NDArray[np.int64]) -> Bytes:
    chances = frequencies(counts)
    states, words = encode(symbols, chances)
    parts = chances.astype("<u2"), np.array([len(words)], "<u4"), states.astype("<u4"), words.astype("<u2")
    return np.concatenate([part.view(np.uint8) for part in parts])


def _read_coded(stream: Bytes, alphabet: int, count: int) -> tuple[Bytes, Bytes]:
    table, rest = _split(stream, 2 * alphabet)
    held, rest = _split(rest, 4)
    states, rest = _split(rest, 4 * lanes_of(count))
    words, rest = _split(rest, 2 * int.from_bytes(held.tobytes(), "little"))
    chances = table.copy().view("<u2").astype(np.uint32)
    if int(chances.sum()) != TOTAL:
        raise CheckpointError(f"the frequencies of a stream sum to {int(chances.sum())}, and to {TOTAL} when written")
    states, words = states.copy().view("<u4").astype(np.uint32), words.copy().view("<u2").astype(np.uint16)
    return decode(states, words, chances, count), rest


def _split(stream: Bytes, size: int) -> tuple[Bytes, Bytes]:
    """The first bytes and the others; sizes are held against what is there before anything is allocated."""
    if size > len(stream):
        raise CheckpointError(f"a stream is cut short: {size:,} bytes are due and {len(stream):,} are left")
    return stream[:size], stream[size:]
