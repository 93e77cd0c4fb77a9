"""Asymmetric numeral systems: symbols in what their frequencies say they take, many at a time.

A state x holds all symbols coded so far. With f of 2^14 chances for a symbol, and c for all before it,

    coding     x <- (x // f) * 2^14 + c + x % f                       (Duda, C(s, x))
    decoding   slot = x % 2^14 tells s;  x <- f * (x // 2^14) + slot - c      (its inverse, D(x))

so x grows by a factor of 2^14 / f, which is log2(2^14 / f) bits. States stay in 2^16..2^32: before coding a
symbol that would take one out of it, its low 16 bits are moved to the words; after decoding, a state below
2^16 takes them back. Once is always enough. Decoding goes forward, coding backward, as on any stack.

A stream has a lane for every 2048 symbols, each with a state of its own: symbol i belongs to lane i % lanes,
and all lanes take a step at once. They share the words: in one step the lanes that need a word take theirs in
the order of the lanes. Every lane begins coding at 2^16 and so must end there when it is decoded. NumPy takes as long
for a step of one lane as for one of a thousand, so where there are few Python's own integers do the same, one by one.

Sources: Duda 2013, "Asymmetric numeral systems", arXiv:1311.2540, section 3.3; Giesen 2014, "Interleaved
entropy coders", arXiv:1402.3392, for lanes that share one stream of words.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sparsekit.errors import CheckpointError

Array = npt.NDArray[np.unsignedinteger]

BITS = 14  # of a frequency: an alphabet of 256 has 64 chances a symbol to be told apart by
TOTAL = 1 << BITS
WORD = 16  # bits moved at once
LEAST = 1 << WORD  # of a state, and what every lane begins with
FEW = 32  # lanes; one by one is 30 times as fast with one lane and 1.4 times with 32
STEPS = 2048  # symbols of a lane at most, so a lane's 4 bytes are 1/64 bit a symbol
SHORT = "the coded stream ends before its last symbol"
CHANGED = "the coded stream does not end as it was begun: its bytes were changed"


def lanes_of(count: int) -> int:
    """Lanes of a stream of so many symbols."""
    return -(-count // STEPS)


def frequencies(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
    """Chances out of 2^14, nearly in proportion: what occurs has one at least, what does not has none.

    Args:
        counts: How often each symbol occurs, [alphabet], at most 256 and one of them at least once.
    """
    chances = np.maximum((counts * TOTAL + counts.sum() // 2) // counts.sum(), counts > 0)
    while surplus := int(chances.sum()) - TOTAL:  # the coded length changes by about counts / chances
        if surplus > 0:
            chances[np.where(chances > 1, counts / np.maximum(chances, 1), np.inf).argmin()] -= 1
        else:
            chances[(counts / np.maximum(chances, 1)).argmax()] += 1
    told: npt.NDArray[np.uint32] = chances.astype(np.uint32)
    return told


def encode(symbols: npt.NDArray[np.uint8], chances: npt.NDArray[np.uint32]) -> tuple[Array, Array]:
    """Code symbols.

    Args:
        symbols: Indices into `chances`, [n]; each has at least one chance.
        chances: uint32 [alphabet], 2^14 in all.
    Returns:
        The states, uint32 [lanes], and the words, uint16, both in the order in which a decoder reads them.
    """
    lanes = lanes_of(len(symbols))
    before = np.cumsum(chances, dtype=np.uint32) - chances
    if lanes <= FEW:
        return _encode_one_by_one(symbols.tolist(), lanes, chances.tolist(), before.tolist())
    states, words = np.full(lanes, LEAST, np.uint32), list[Array]()
    for start in reversed(range(0, len(symbols), lanes)):
        step = symbols[start : start + lanes]  # the last one may be shorter
        state, chance = states[: len(step)], chances.take(step)
        full = np.flatnonzero(state >> 32 - BITS >= chance)
        words.append(state[full].astype(np.uint16))  # the low half
        state[full] >>= WORD
        state += state // chance * (TOTAL - chance) + before.take(step)
    return states, np.concatenate(words[::-1])


def _encode_one_by_one(symbols: list[int], lanes: int, chances: list[int], before: list[int]) -> tuple[Array, Array]:
    states, words = [LEAST] * lanes, list[int]()
    for place in reversed(range(len(symbols))):
        state, symbol = states[place % lanes], symbols[place]
        chance = chances[symbol]
        if state >> 32 - BITS >= chance:
            words.append(state & LEAST - 1)
            state >>= WORD
        states[place % lanes] = state + state // chance * (TOTAL - chance) + before[symbol]
    return np.array(states, np.uint32), np.array(words[::-1], np.uint16)


def decode(states: Array, words: Array, chances: npt.NDArray[np.uint32], count: int) -> npt.NDArray[np.uint8]:
    """Inverse of `encode`.

    Args:
        states: uint32 [lanes_of(count)].
        words: uint16.
        chances: uint32 [alphabet], at most 256, 2^14 in all.
        count: Symbols to decode.
    Returns:
        uint8 [count].
    Raises:
        CheckpointError: Nothing that `encode` writes: words are left or missing, or a lane does not end at 2^16.
    """
    if bool((states < LEAST).any()):
        raise CheckpointError("a state of the coded stream is below 2^16")
    symbol = np.repeat(np.arange(len(chances), dtype=np.uint8), chances)  # of each slot
    factor = chances.take(symbol)
    rest = np.arange(TOTAL, dtype=np.uint32) - (np.cumsum(chances, dtype=np.uint32) - chances).take(symbol)
    if len(states) <= FEW:
        slots = symbol.tolist(), factor.tolist(), rest.tolist()
        return _decode_one_by_one(states.tolist(), words.tolist(), *slots, count)
    states, found, place = states.copy(), np.empty(count, np.uint8), 0
    for start in range(0, count, len(states)):
        step = found[start : start + len(states)]
        state = states[: len(step)]
        slot = state & TOTAL - 1
        step[:] = symbol.take(slot)
        state >>= BITS
        state *= factor.take(slot)
        state += rest.take(slot)
        empty = np.flatnonzero(state < LEAST)
        taken = words[place : place + len(empty)]
        if len(taken) < len(empty):
            raise CheckpointError(SHORT)
        state[empty] = state[empty] << WORD | taken
        place += len(empty)
    if place != len(words) or bool((states != LEAST).any()):
        raise CheckpointError(CHANGED)
    return found


def _decode_one_by_one(
    states: list[int], words: list[int], symbol: list[int], factor: list[int], rest: list[int], count: int
) -> npt.NDArray[np.uint8]:
    found, coming = bytearray(count), iter(words)
    for place in range(count):
        lane = place % len(states)
        slot = states[lane] & TOTAL - 1
        state = factor[slot] * (states[lane] >> BITS) + rest[slot]
        if state < LEAST:
            word = next(coming, None)
            if word is None:
                raise CheckpointError(SHORT)
            state = state << WORD | word
        states[lane] = state
        found[place] = symbol[slot]
    if next(coming, None) is not None or any(state != LEAST for state in states):
        raise CheckpointError(CHANGED)
    return np.frombuffer(found, np.uint8)
