"""The coder of sparsekit-coded: every word against a slow one, every symbol back, every other stream refused."""

from bisect import bisect_right
from collections import deque
from contextlib import suppress
from itertools import accumulate
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit.errors import CheckpointError
from sparsekit.formats import rans, streams
from sparsekit.formats.rans import LEAST, STEPS, TOTAL, decode, encode, frequencies, lanes_of

FEW = settings(max_examples=80, deadline=None, derandomize=True)


def slow_encode(symbols: list[int], chances: list[int]) -> tuple[list[int], list[int]]:
    """One symbol after another, last one first, as the papers have it; Python's own integers."""
    lanes = -(-len(symbols) // STEPS)
    states, words, starts = [LEAST] * lanes, [], [0, *accumulate(chances)]
    steps = [list(range(start, min(start + lanes, len(symbols)))) for start in range(0, len(symbols), max(lanes, 1))]
    for step in reversed(steps):
        moved = []  # what a decoder reads in this step, in the order of the lanes
        for place in step:
            lane, symbol = place % lanes, symbols[place]
            chance, before = chances[symbol], starts[symbol]
            if states[lane] >= chance * 2**18:  # it would leave 2^16..2^32
                moved.append(states[lane] % 2**16)
                states[lane] //= 2**16
            states[lane] = states[lane] // chance * 2**14 + before + states[lane] % chance
        words = moved + words
    return states, words


def slow_decode(states: list[int], words: list[int], chances: list[int], count: int) -> list[int]:
    """The inverse, word by word."""
    states, words, found, starts = list(states), deque(words), [], [0, *accumulate(chances)]
    for place in range(count):
        lane = place % len(states)
        slot = states[lane] % 2**14
        symbol = bisect_right(starts, slot) - 1
        states[lane] = chances[symbol] * (states[lane] // 2**14) + slot - starts[symbol]
        if states[lane] < 2**16:
            states[lane] = states[lane] * 2**16 + words.popleft()
        found.append(symbol)
    assert not words
    assert set(states) <= {LEAST}
    return found


def drawn(count: int, alphabet: int, skew: float, seed: int = 0) -> np.ndarray:
    """Symbols whose frequencies fall by a factor."""
    chance = np.exp(-skew * np.arange(alphabet))
    return np.random.default_rng(seed).choice(alphabet, count, p=chance / chance.sum()).astype(np.uint8)


def counted(symbols: np.ndarray, alphabet: int) -> np.ndarray:
    return np.bincount(symbols, minlength=alphabet)


@pytest.mark.parametrize("count", [1, 2, 5, STEPS - 1, STEPS, STEPS + 1, 3 * STEPS + 7])
@pytest.mark.parametrize(("alphabet", "skew"), [(1, 0), (2, 0), (2, 9), (6, 0.1), (16, 0.5), (256, 0)])
def test_every_word_is_the_slow_coders(count, alphabet, skew):
    symbols = drawn(count, alphabet, skew)
    chances = frequencies(counted(symbols, alphabet))
    for few in (0, rans.FEW):  # many lanes at once, one by one
        with patch.object(rans, "FEW", few):
            states, words = encode(symbols, chances)
            assert (states.tolist(), words.tolist()) == slow_encode(symbols.tolist(), chances.tolist())
            assert decode(states, words, chances, count).tolist() == symbols.tolist()
    assert slow_decode(states.tolist(), words.tolist(), chances.tolist(), count) == symbols.tolist()


def test_no_symbols_take_no_words():
    chances = frequencies(np.array([1]))
    states, words = encode(np.empty(0, np.uint8), chances)
    assert (len(states), len(words)) == (0, 0)
    assert len(decode(states, words, chances, 0)) == 0


@FEW
@given(st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 50, 10**5, 10**9]), min_size=1, max_size=256).filter(any))
def test_chances_sum_up_and_nobody_who_occurs_has_none(counts):
    chances = frequencies(np.array(counts))
    assert int(chances.sum()) == TOTAL
    assert [chance > 0 for chance in chances.tolist()] == [count > 0 for count in counts]


@pytest.mark.parametrize("rare", [127, 128, 200, 255])
def test_chances_of_many_that_hardly_occur(rare):
    counts = np.array([1] * rare + [10**8] * (256 - rare))
    chances = frequencies(counts)
    assert int(chances.sum()) == TOTAL
    assert set(chances[:rare].tolist()) == {1}
    assert int(chances[rare:].max()) - int(chances[rare:].min()) <= 1


@FEW
@given(data=st.data(), count=st.integers(1, 6000), alphabet=st.integers(1, 256), skew=st.sampled_from([0, 0.01, 1, 20]))
def test_any_symbols_come_back(data, count, alphabet, skew):
    symbols = drawn(count, alphabet, skew, data.draw(st.integers(0, 99)))
    chances = frequencies(counted(symbols, alphabet))
    for few in (0, rans.FEW):
        with patch.object(rans, "FEW", few):
            assert np.array_equal(decode(*encode(symbols, chances), chances, count), symbols)


@pytest.mark.parametrize(
    ("alphabet", "skew"), [(2, 0), (2, 1), (3, 0.2), (6, 0), (8, 0.3), (16, 0.2), (216, 0.01), (256, 0.05)]
)
def test_size_is_the_entropy(alphabet, skew):
    """Within 1 % and 3 bytes a lane: the 2 that every state starts with, and one that is left in it on the mean."""
    symbols = drawn(300_000, alphabet, skew)
    chances = frequencies(counted(symbols, alphabet))
    states, words = encode(symbols, chances)
    share = counted(symbols, alphabet)[chances > 0] / len(symbols)
    entropy = float(-(share * np.log2(share)).sum()) * len(symbols) / 8
    assert entropy <= states.nbytes + words.nbytes <= 1.01 * entropy + 3 * lanes_of(len(symbols))


@pytest.mark.parametrize("few", [0, rans.FEW])
def test_what_was_never_coded_is_refused(few, monkeypatch):
    monkeypatch.setattr(rans, "FEW", few)
    symbols = drawn(5000, 16, 0.3)
    chances = frequencies(counted(symbols, 16))
    states, words = encode(symbols, chances)

    def refused(message: str, states: np.ndarray, words: np.ndarray) -> None:
        with pytest.raises(CheckpointError, match=message):
            decode(states, words, chances, len(symbols))

    refused("ends before its last symbol", states, words[:-1])
    refused("does not end as it was begun", states, np.append(words, words[:1]))
    refused("does not end as it was begun", states, np.append(words, [0]).astype(np.uint16))
    low, other = states.copy(), words.copy()
    low[1] = LEAST - 1
    refused("below 2\\^16", low, words)
    other[7] ^= 1
    refused("was begun|before its last", states, other)


# streams: alphabets, kinds and bytes


@FEW
@given(
    data=st.data(), rows=st.integers(1, 40), columns=st.integers(1, 200), alphabet=st.integers(1, 256),
    skew=st.sampled_from([0, 0.05, 3]),
)  # fmt: skip
def test_any_matrix_comes_back(data, rows, columns, alphabet, skew):
    apart = data.draw(st.integers(1, max(1, 255 // max(1, alphabet - 1))))
    first = data.draw(st.integers(0, 255 - apart * (alphabet - 1)))
    matrix = (first + apart * drawn(rows * columns, alphabet, skew).astype(int)).astype(np.uint8).reshape(rows, columns)
    stream = streams.written(matrix)
    found, rest = streams.read(np.append(stream, [1, 2]).astype(np.uint8))
    assert np.array_equal(found, matrix)
    assert rest.tolist() == [1, 2]
    assert len(stream) <= 12 + -(-matrix.size * max(1, (alphabet - 1).bit_length()) // 8)  # never more than packed


def test_the_smaller_kind_is_written():
    even, skewed = drawn(4096, 256, 0).reshape(64, 64), drawn(4096, 4, 1).reshape(64, 64)
    assert (streams.written(even)[11], len(streams.written(even))) == (streams.PACKED, 12 + 4096)
    assert streams.written(skewed)[11] == streams.CODED
    odd, wide = streams.written(2 * skewed + 1), streams.written(skewed)
    assert odd[8:11].tolist() == [1, 2, 3]
    assert len(odd) == len(wide)
    constant = streams.written(np.full((1000, 1000), 7, np.uint8))
    assert len(constant) == 12 + 2 + 4 + 4 * lanes_of(10**6)


def patched(stream: np.ndarray, place: int, *values: int) -> np.ndarray:
    return np.concatenate((stream[:place], np.array(values, np.uint8), stream[place + len(values) :]))


def test_streams_that_were_never_written_are_refused():
    stream = streams.written(drawn(4096, 5, 0.5).reshape(64, 64))
    assert stream[11] == streams.CODED
    for message, wrong in {
        "cut short: 12 bytes are due and 4 are left": stream[:4],
        "cut short: 1,024 bytes|cut short: .* are left": stream[:-2],
        "a stream of 0 rows": patched(stream, 0, 0),
        "are no bytes": patched(stream, 8, 255),
        "in steps of 0": patched(stream, 9, 0),
        "unknown kind 7": patched(stream, 11, 7),
        "frequencies of a stream sum to": patched(stream, 12, 0),
        "cut short: 534,773,768 bytes are due": patched(stream, 3, 255),  # rows: more lanes than any file has
        "does not end as it was begun|before its last": patched(stream, len(stream) - 9, int(stream[-9]) ^ 1),
    }.items():
        with pytest.raises(CheckpointError, match=message):
            streams.read(wrong)
    packed = streams.written(np.array([[0, 1, 2]], np.uint8))
    assert packed[11] == streams.PACKED
    with pytest.raises(CheckpointError, match="number 3 of an alphabet of 3"):
        streams.read(patched(packed, 12, 255))


@FEW
@given(st.binary(max_size=80), st.integers(0, 200), st.integers(0, 255))
def test_hostile_bytes_are_refused_or_small(content, place, value):
    good = streams.written(drawn(300, 9, 0.4).reshape(3, 100))
    for stream in (np.frombuffer(content, np.uint8), patched(good, place % len(good), value)):
        with suppress(CheckpointError):
            found, _ = streams.read(stream)
            assert found.size <= 512 * len(stream)
