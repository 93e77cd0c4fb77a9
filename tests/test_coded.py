"""sparsekit-coded: every integer back, no more bytes than the compact formats, every other file refused by name."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsekit.checkpoint import BlockState
from sparsekit.errors import CheckpointError
from sparsekit.formats import FORMATS, streams
from sparsekit.formats.base import Setting, find_setting
from sparsekit.formats.coded import BITS, Coded
from sparsekit.pattern import Pattern
from sparsekit.quant import Grid, Levels, QuantizedWeight
from sparsekit.state import LinearState

CODED = Coded()


def made(
    bits: int = 4, shape=(6, 96), group: int = 16, *, two=True, symmetric=True, levels: Levels = "integer", seed=0
) -> LinearState:
    """A linear of normal weights, rounded; `bits` are those of its grid."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    mask = Pattern(2, 4).keep(weight.abs()) if two else torch.ones_like(weight, dtype=torch.bool)
    grouped, kept = ((part).reshape(shape[0], -1, group) for part in (weight * mask, mask))
    grid = Grid.fit(grouped, bits, symmetric=symmetric, levels=levels)
    codes = (grid.round(grouped, kept) / grid.scale[..., None] + grid.zero[..., None]).round().to(torch.uint8)
    found = QuantizedWeight.of(codes.reshape(shape), grid, group_size=group, symmetric=symmetric)
    return LinearState("a.q", found.dequantize(), mask if two else None, found)


def setting(state: LinearState) -> Setting:
    """As a reader learns it."""
    blocks = [(BlockState({state.name: state}, {}), {f"{state.name}.weight"})]
    return CODED.setting(CODED.config(find_setting(CODED, blocks), []))


def stored(storage, state: LinearState, layout: str) -> int:
    return sum(tensor.nbytes for tensor in storage.pack(state.quantized, layout, state.mask).values())


@pytest.mark.parametrize("two", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_every_integer_comes_back(bits, symmetric, two):
    for group, columns in ((16, 96), (20, 20), (18, 36), (7, 21)):  # rows of 21 have no groups of four
        state = made(bits, (5, columns), group, two=two and not columns % 4, symmetric=symmetric)
        packed, found = CODED.pack(state.quantized, "v1", state.mask), setting(state)
        assert packed.keys() - {"patterns"} == {"values", "scales", *([] if symmetric else ["zeros"])}
        assert CODED.unpack(packed, found).equal(state.quantized)
        told = CODED.mask(packed)
        assert told is None if state.mask is None and columns % 4 else torch.equal(told, state.mask) if two else True


def slow(stream: list[int], chances: int, count: int) -> list[int]:
    """The numbers of a coded stream of one lane, by the docs and Python's own integers."""
    first, apart, last, kind = stream[8:12]
    assert (kind, count <= 2048) == (1, True)

    def whole(place: int, size: int) -> int:
        return int.from_bytes(bytes(stream[place : place + size]), "little")

    table = [whole(12 + 2 * index, 2) for index in range(last + 1)]
    begin = 12 + 2 * len(table)
    words = [whole(begin + 8 + 2 * index, 2) for index in range(whole(begin, 4))]
    state, found = whole(begin + 4, 4), []
    slots = [(symbol, slot) for symbol, chance in enumerate(table) for slot in range(chance)]
    assert len(slots) == chances
    for _ in range(count):
        symbol, rest = slots[state % chances]
        state = table[symbol] * (state // chances) + rest
        if state < 2**16:
            state = state * 2**16 + words.pop(0)
        found.append(first + apart * symbol)
    assert (state, words) == (2**16, [])
    return found


def test_the_docs_tell_how_to_read_it():
    state = made(5, (8, 256), 128, levels="odd")
    packed = CODED.pack(state.quantized, "v1", state.mask)
    pairs = list(itertools.combinations(range(4), 2))
    codes, patterns = (
        slow(packed[name].tolist()[begin:], 2**14, size)
        for name, begin, size in (("values", 1, 1024), ("patterns", 0, 512))
    )
    expected = torch.full((8, 256), 16, dtype=torch.uint8)
    for group, pattern in enumerate(patterns):
        for which, place in enumerate(pairs[pattern]):
            expected[group // 64, group % 64 * 4 + place] = codes[2 * group + which]
    assert torch.equal(expected, state.quantized.codes)


@pytest.mark.parametrize(
    ("compact", "layout", "bits", "two"),
    [("-24-compact", "integer", 4, True), ("-24-compact", "integer", 2, True), ("-24-compact", "odd", 3, True),
     ("-24-compact", "odd", 5, True), ("-compact", "integer", 4, False), ("-compact", "odd", 3, False),
     ("-compact", "ternary", 2, False)],
)  # fmt: skip
def test_it_is_smaller_than_the_compact_format(compact, layout, bits, two):
    state = made(bits, (128, 1024), 128, two=two, levels=layout)
    assert stored(CODED, state, "v1") < 0.98 * stored(FORMATS[f"sparsekit{compact}"].storage, state, layout)


def test_codes_without_any_order_are_hardly_larger():
    """Codes of equal frequency: what a lane's state costs, and the header."""
    state = made(4, (128, 1024), 128, two=False)
    random = torch.randint(0, 16, (128, 1024), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    values = CODED.pack(dataclasses.replace(state.quantized, codes=random), "v1")["values"]
    assert values.numel() == 13 + random.numel() // 2


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 99), share=st.floats(0, 1), bits=st.sampled_from(BITS), symmetric=st.booleans())
def test_groups_with_any_number_of_weights(seed, share, bits, symmetric):
    """Pruned beyond 2:4, or only partly 2:4, with a mask or without."""
    state = made(bits, (4, 32), seed=seed, two=False, symmetric=symmetric)
    kept = torch.rand(4, 32, generator=torch.Generator().manual_seed(seed)) < share
    weight = state.quantized
    codes = torch.where(kept, weight.codes, weight.zero[:, weight.group_of.long()])
    weight = dataclasses.replace(weight, codes=codes)
    for mask in (None, kept):
        packed = CODED.pack(weight, "v1", mask)
        assert CODED.unpack(packed, setting(state)).equal(weight)
        told = CODED.mask(packed)
        assert told is None or not weight.dequantize()[~told].any()


def test_permuted_groups_come_back():
    state = made()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    weight = dataclasses.replace(state.quantized, group_of=state.quantized.group_of.reshape(-1, 4)[order].flatten())
    codes = torch.where(state.mask, weight.codes, weight.zero[:, weight.group_of.long()])
    weight = dataclasses.replace(weight, codes=codes)
    packed = CODED.pack(weight, "v1", state.mask)
    assert packed["group_of"].dtype == torch.int32
    assert CODED.unpack(packed, setting(state.with_quantized(weight))).equal(weight)


def stream(*shape: int, highest: int) -> Tensor:
    """A row of bytes that holds the numbers from the highest one down to 0, again and again."""
    numbers = highest - np.arange(np.prod(shape)) % (highest + 1)
    return torch.from_numpy(streams.written(numbers.astype(np.uint8).reshape(shape)))


def test_bad_bytes_are_named():
    state = made(3, (4, 80), symmetric=False)
    found, packed = setting(state), CODED.pack(state.quantized, "v1", state.mask)
    two = torch.tensor([2], dtype=torch.uint8)

    def refused(message: str, **tensors: Tensor) -> None:
        with pytest.raises(CheckpointError, match=message):
            CODED.unpack(packed | tensors, found)

    refused("patterns: a stream is cut short", patterns=packed["patterns"][:-1])
    refused("values: 1 bytes behind the end", values=torch.cat((packed["values"], packed["values"][:1])))
    refused(r"values of \[3\] inputs of every four", values=torch.cat((two + 1, packed["values"][1:])))
    refused(r"values of \[4\] inputs of every four", values=torch.cat((two + 2, packed["values"][1:])))
    refused(r"values of \[\] inputs of every four", values=two[:0])
    refused("patterns holds 6", patterns=stream(4, 20, highest=6))
    refused(r"values has shape .* do not fit", values=torch.cat((two, stream(4, 36, highest=3))))
    refused(r"values has shape .* do not fit", patterns=stream(3, 20, highest=3))
    refused(r"scales has shape .* do not fit", scales=torch.cat((stream(4, 5, highest=3), stream(4, 4, highest=3))))
    refused("scales: a stream is cut short: 12 bytes are due and 0", scales=stream(4, 5, highest=3))
    refused("not all finite", scales=torch.cat((stream(4, 5, highest=0x7C), stream(4, 5, highest=1))))
    refused(r"zeros has shape .* do not fit", zeros=stream(4, 4, highest=3))
    refused("9 is no code of 3 bits", values=torch.cat((two, stream(4, 40, highest=9))))
    refused("15 is no code of 3 bits", zeros=stream(4, 5, highest=15))
    refused("values is torch.float16", values=packed["values"].half())
    refused(r"patterns is torch.uint8 \[1, \d+\], expected a row", patterns=packed["patterns"][None])
    with pytest.raises(CheckpointError, match="group size 7 does not divide"):
        CODED.unpack(packed, dataclasses.replace(found, group_size=7))
    with pytest.raises(CheckpointError, match="lacks the tensor values"):
        CODED.unpack({}, found)
    for missing in packed:
        with pytest.raises(CheckpointError, match=f"lacks the tensor {missing}"):
            CODED.unpack({name: tensor for name, tensor in packed.items() if name != missing}, found)


def test_scales_that_float16_cannot_hold_are_refused():
    state = made()
    weight = dataclasses.replace(state.quantized, scale=state.quantized.scale.float() * 1.0001)
    with pytest.raises(CheckpointError, match=r"no sparsekit-coded export: a.q: its scales are float32 values"):
        setting(state.with_quantized(weight))


def test_headers_that_contradict_themselves_are_named():
    good = CODED.config(setting(made()), [])
    for change, message in (
        ({"version": 2}, "version is 2; this version reads 1"),
        ({"bits": 9}, "bits is 9"),
        ({"symmetric": 1}, "symmetric is 1"),
        ({"group_size": None}, "group_size is None"),
    ):
        with pytest.raises(CheckpointError, match=message):
            CODED.setting(good | change)
