"""sparsekit-24-compact: every bit against a slow writer, every integer back, every other file refused by name."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsekit.checkpoint import BlockState
from sparsekit.errors import CheckpointError
from sparsekit.formats import FORMATS
from sparsekit.formats.base import Setting, find_setting
from sparsekit.formats.compact24 import INTEGER, ODD, SIX, STORED, Compact24
from sparsekit.quant import QuantizedWeight
from sparsekit.state import LinearState

COMPACT = Compact24()
KINDS = [(levels, bits) for levels, allowed in STORED.items() for bits in allowed]


def made(levels: str, bits: int, shape=(6, 96), group: int = 16, seed: int = 0, symmetric: bool = True) -> LinearState:
    """A 2:4 linear of random integers; `bits` are those of a kept value."""
    random = torch.Generator().manual_seed(seed)
    order = torch.rand(*shape[:1], shape[1] // 4, 4, generator=random).argsort(-1)
    mask = (order < 2).reshape(shape)
    width = bits + (levels in (ODD, SIX))
    zero = torch.full((shape[0], shape[1] // group), 2 ** (width - 1), dtype=torch.uint8)
    if not symmetric:
        zero = torch.randint(0, 2**width, zero.shape, generator=random).to(torch.uint8)
    codes = torch.randint(0, 6 if levels == SIX else 2**bits, shape, generator=random).to(torch.uint8)
    codes = {ODD: codes * 2 + 1, SIX: codes * 2 + 3, INTEGER: codes}[levels]
    codes = torch.where(mask, codes, zero.repeat_interleave(group, 1))
    scale = torch.rand(zero.shape, generator=random).add(0.1).half()
    groups = torch.arange(shape[1], dtype=torch.int32) // group
    weight = QuantizedWeight(codes, scale, zero, groups, width, group, symmetric)
    return LinearState("a.q", weight.dequantize(), mask, weight)


def setting(state: LinearState) -> Setting:
    """As a reader learns it."""
    blocks = [(BlockState({state.name: state}, {}), {f"{state.name}.weight"})]
    return COMPACT.setting(COMPACT.config(find_setting(COMPACT, blocks), []))


def slow_six(state: LinearState) -> list[list[int]]:
    """The bytes of values with six levels, looked up one group after another."""
    pairs, levels, values = list(itertools.combinations(range(4), 2)), [-5, -3, -1, 1, 3, 5], []
    for codes, kept in zip(state.quantized.codes.tolist(), state.mask.tolist(), strict=True):
        values.append([])
        for start in range(0, len(codes), 4):
            places = [place for place in range(4) if kept[start + place]]
            a, b = (levels.index(codes[start + place] - 8) for place in places)
            values[-1].append(pairs.index(tuple(places)) + 6 * (a + 6 * b))
    return values


def slow(state: LinearState, levels: str) -> tuple[list[list[int]], list[list[int]] | None]:
    """The bytes of values and patterns, by Python's own integers."""
    if levels == SIX:
        return slow_six(state), None
    weight, values, patterns = state.quantized, [], []
    bits = weight.bits - (levels == ODD)
    pairs = list(itertools.combinations(range(4), 2))
    for codes, kept in zip(weight.codes.tolist(), state.mask.tolist(), strict=True):
        held = [code >> 1 if levels == ODD else code for code, keep in zip(codes, kept, strict=True) if keep]
        stream = sum(code << bits * place for place, code in enumerate(held))
        values.append(list(stream.to_bytes(len(held) * bits // 8, "little")))
        cells = [[place for place in range(4) if kept[start + place]] for start in range(0, len(kept), 4)]
        numbers = [pairs.index(tuple(cell)) for cell in cells]
        threes = [numbers[start : start + 3] for start in range(0, len(numbers), 3)]
        patterns.append([sum(number * 6**place for place, number in enumerate(three)) for three in threes])
    return values, patterns


@pytest.mark.parametrize("columns", [16, 48, 96, 128])
@pytest.mark.parametrize(("levels", "bits"), KINDS)
def test_every_byte_is_the_slow_writers(levels, bits, columns):
    state = made(levels, bits, (5, columns))
    packed = COMPACT.pack(state.quantized, levels, state.mask)
    patterns = packed["patterns"].tolist() if "patterns" in packed else None
    assert (packed["values"].tolist(), patterns) == slow(state, levels)
    assert all(tensor.is_contiguous() for tensor in packed.values())


@pytest.mark.parametrize("group", [16, 96])
@pytest.mark.parametrize(("levels", "bits"), KINDS)
def test_levels_are_found_and_every_integer_comes_back(levels, bits, group):
    state = made(levels, bits, group=group)
    found = setting(state)
    assert (found.layout, found.bits) == (levels, state.quantized.bits)
    assert COMPACT.config(found, [])["bits"] == bits
    for mask in (state.mask, None):
        packed = COMPACT.pack(state.quantized, levels, mask)
        assert COMPACT.unpack(packed, found).equal(state.quantized)
    assert torch.equal(COMPACT.mask(COMPACT.pack(state.quantized, levels, state.mask)), state.mask)


@pytest.mark.parametrize(("bits", "expected"), [(4, 2.79), (3, 2.29), (2, 1.79), (1, 1.29)])
def test_bits_a_weight_with_groups_of_128(bits, expected):
    state = made(ODD, bits, (64, 3072), group=128)
    stored = 8 * sum(tensor.nbytes for tensor in COMPACT.pack(state.quantized, ODD, state.mask).values())
    assert round(stored / state.source.numel(), 2) == expected
    assert stored / state.source.numel() == pytest.approx(bits / 2 + 2 / 3 + 16 / 128)


def test_six_levels_take_two_bits_a_weight():
    state = made(SIX, 3, (64, 3072), group=128)
    packed = COMPACT.pack(state.quantized, SIX, state.mask)
    assert packed.keys() == {"values", "scales"}
    assert 8 * sum(tensor.nbytes for tensor in packed.values()) / state.source.numel() == 2 + 16 / 128


def test_each_of_the_216_groups_has_a_byte():
    """The 6 places and 6 x 6 levels, one group of each, four in a row."""
    codes = torch.full((216, 4), 8, dtype=torch.uint8)
    states = itertools.product(itertools.combinations(range(4), 2), range(3, 14, 2), range(3, 14, 2))
    for group, (places, a, b) in zip(codes, states, strict=True):
        group[list(places)] = torch.tensor([a, b], dtype=torch.uint8)
    state = made(SIX, 3, (54, 16))
    state = state.with_quantized(dataclasses.replace(state.quantized, codes=codes.reshape(54, 16)))
    packed = COMPACT.pack(state.quantized, SIX)
    assert sorted(packed["values"].flatten().tolist()) == list(range(216))
    assert COMPACT.unpack(packed, setting(state)).equal(state.quantized)
    assert torch.equal(COMPACT.mask(packed), codes.reshape(54, 16) != 8)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    data=st.data(), symmetric=st.booleans(), bits=st.sampled_from(STORED[INTEGER]), columns=st.sampled_from([16, 80])
)
def test_integers_hold_any_group_with_at_most_two_weights(data, symmetric, bits, columns):
    """Groups of 4 with 0, 1 or 2 weights, with any codes, and kept weights that were rounded to zero."""
    state = made(INTEGER, bits, (3, columns), seed=data.draw(st.integers(0, 999)), symmetric=symmetric)
    weight = state.quantized
    dropped = (
        torch.rand(state.mask.shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999)))) < 0.4
    )
    mask = state.mask & ~dropped
    codes = torch.where(mask, weight.codes, weight.zero[:, weight.group_of.long()])
    state = dataclasses.replace(state, mask=mask).with_quantized(dataclasses.replace(weight, codes=codes))
    found = setting(state)
    packed = COMPACT.pack(state.quantized, INTEGER, mask)
    assert COMPACT.unpack(packed, dataclasses.replace(found, layout=INTEGER)).equal(state.quantized)
    stored = COMPACT.mask(packed)
    assert not bool((mask & ~stored).any())  # every kept weight is stored, whatever its code
    assert bool((stored.reshape(3, -1, 4).sum(-1) == 2).all())


@pytest.mark.parametrize(("levels", "bits"), [(ODD, 2), (SIX, 3)])
def test_permuted_groups_come_back(levels, bits):
    state = made(levels, bits)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    weight = dataclasses.replace(state.quantized, group_of=state.quantized.group_of[order])
    packed = COMPACT.pack(weight, levels, state.mask)
    assert packed["group_of"].dtype == torch.int32
    assert COMPACT.unpack(packed, setting(state.with_quantized(weight))).equal(weight)


@pytest.mark.parametrize(
    ("levels", "bits"), [(ODD, 1), (ODD, 2), (ODD, 3), (SIX, 3), (INTEGER, 2), (INTEGER, 3), (INTEGER, 4)]
)
def test_from_gptq_and_back_is_lossless(levels, bits):
    """Odd and six levels are ordinary integers of one bit more to everybody else."""
    gptq, state = FORMATS["gptq"].storage, made(levels, bits, (32, 96), group=32)
    first = gptq.pack(state.quantized, "gptq")
    read = gptq.unpack(first, Setting(state.quantized.bits, 32, True, False, "gptq"))
    found = COMPACT.unpack(COMPACT.pack(read, levels, state.mask), setting(state))
    assert all(torch.equal(tensor, gptq.pack(found, "gptq")[key]) for key, tensor in first.items())


def broken(state: LinearState, change) -> LinearState:
    codes = state.quantized.codes.clone()
    change(codes)
    return state.with_quantized(dataclasses.replace(state.quantized, codes=codes))


def even(codes: Tensor) -> None:
    codes[codes == 1] = 2


def one_pruned(codes: Tensor) -> None:
    codes[0, :4] = codes.new_tensor([16, 16, 16, 17])


def test_what_is_not_odd_is_stored_as_integers_or_refused_by_name():
    assert setting(broken(made(ODD, 2), even)).layout == INTEGER  # 3 bits then
    state = made(ODD, 4)
    for change, why in ((even, "kept codes are an even number of steps"), (one_pruned, "groups of 4 do not hold")):
        with pytest.raises(CheckpointError, match=rf"no sparsekit-24-compact export: a.q: 5 bits have no .*{why}"):
            setting(broken(state, change))
    with pytest.raises(CheckpointError, match=r"6 bits have no sparsekit-24-compact layout.*6 bits are stored as 5"):
        setting(made(INTEGER, 6))
    with pytest.raises(CheckpointError, match="groups of 4 hold more than two weights"):
        setting(broken(made(INTEGER, 4), lambda codes: codes.fill_(1)))
    with pytest.raises(CheckpointError, match="24 inputs are not a multiple of 16"):
        setting(made(INTEGER, 4, (4, 24), group=24))


SIXES = {  # changes of a group or more, the levels then, and why they are no six ones
    "far": (lambda codes: codes.masked_fill_(codes == 13, 15), ODD, "codes are more than 5 steps from zero"),
    "even": (lambda codes: codes.masked_fill_(codes == 13, 12), INTEGER, "kept codes are an even number of steps"),
    "pruned": (lambda codes: codes[0, :4].fill_(8), INTEGER, "groups of 4 do not hold exactly two weights"),
}


@pytest.mark.parametrize(("change", "levels", "why"), SIXES.values(), ids=SIXES.keys())
def test_what_is_not_six_is_stored_as_odd_or_integers(change, levels, why):
    state = broken(made(SIX, 3), change)
    assert setting(state).layout == levels
    with pytest.raises(CheckpointError, match=f"a.q: {why}"):
        find_setting(COMPACT, [(BlockState({"a.q": state}, {}), {"a.q.weight"})], SIX)
    linears = {name: dataclasses.replace(held, name=name) for name, held in (("a", made(SIX, 3)), ("b", state))}
    assert find_setting(COMPACT, [(BlockState(linears, {}), {"a.weight", "b.weight"})]).layout == levels
    assert COMPACT.obstacle(made(ODD, 2), SIX) == "3 bits are stored as 2, of which there is no layout"
    assert COMPACT.obstacle(made(INTEGER, 4, symmetric=False), SIX) == "the grid is not symmetric"


def test_one_linear_that_is_not_odd_decides_for_all():
    linears = {name: dataclasses.replace(made(ODD, 2), name=name) for name in ("a", "b")}
    names = {"a.weight", "b.weight"}
    assert find_setting(COMPACT, [(BlockState(linears, {}), names)]).layout == ODD
    linears["b"] = broken(linears["b"], even)
    assert find_setting(COMPACT, [(BlockState(linears, {}), names)]).layout == INTEGER
    with pytest.raises(CheckpointError, match=r"b: kept codes are an even number of steps"):
        find_setting(COMPACT, [(BlockState(linears, {}), names)], ODD)


def test_bad_bytes_are_named():
    state = made(INTEGER, 3, (4, 80), symmetric=False)
    found, packed = setting(state), COMPACT.pack(state.quantized, INTEGER, state.mask)
    assert packed["patterns"].shape == (4, 7)  # 20 groups, and one that is absent

    def refused(message: str, **tensors: Tensor) -> None:
        with pytest.raises(CheckpointError, match=message):
            COMPACT.unpack(packed | tensors, found)

    high, late = packed["patterns"].clone(), packed["patterns"].clone()
    high[0, 0], late[0, -1] = 216, 36
    refused("holds 216; three groups of 4 have 216 patterns", patterns=high)
    refused("more groups at the end of a row than the row has", patterns=late)
    refused(r"no multiple of 16 inputs takes 5 bytes a row", patterns=packed["patterns"][:, :5])
    refused(r"values has shape .* do not fit", values=packed["values"][:, :-1])
    refused("patterns is float16", patterns=packed["patterns"].half())
    refused("a zero-point of 15 is no code of 3 bits", zeros=packed["zeros"] | 255)
    with pytest.raises(CheckpointError, match=r"values has shape .*2 bits and group size 16.*do not fit"):
        COMPACT.unpack(packed, dataclasses.replace(found, bits=2))
    with pytest.raises(CheckpointError, match="lacks the tensor patterns"):
        COMPACT.unpack({"values": packed["values"]}, found)
    with pytest.raises(CheckpointError, match="lacks the tensor values"):
        COMPACT.mask({})


def test_bad_bytes_of_six_levels_are_named():
    state = made(SIX, 3, (4, 80))
    found, packed = setting(state), COMPACT.pack(state.quantized, SIX)
    high = packed["values"].clone()
    high[1, 2] = 216
    for message, tensors in (
        ("values holds 216; a group of 4 with six levels has 216 states, 0..215", {"values": high}),
        (r"values has shape \[4, 19\]: no multiple of 16 inputs takes 19 bytes", {"values": high[:, :-1]}),
        (r"scales has shape \[4, 5\].* make \[4, 4\]", {"values": packed["values"][:, :16]}),
        ("values is int32", {"values": high.int()}),
        ("has patterns, which the values of six levels tell", {"patterns": high}),
    ):
        with pytest.raises(CheckpointError, match=message):
            COMPACT.unpack(packed | tensors, found)


def test_headers_that_contradict_themselves_are_named():
    good = COMPACT.config(setting(made(ODD, 1)), [])
    assert (good["bits"], good["levels"]) == (1, "odd")
    six = COMPACT.config(setting(made(SIX, 3)), [])
    assert (six["bits"], six["levels"]) == (3, "six")
    for change, message in (
        ({"levels": "even"}, "levels is 'even'; this version reads 'odd', 'six', 'integer'"),
        ({"levels": "six"}, "bits is 1; this version reads 3"),
        (six | {"symmetric": False}, "symmetric is False; this version reads True"),
        ({"levels": "integer"}, "bits is 1; this version reads 2, 3, 4"),
        ({"bits": 5}, "bits is 5; this version reads 1, 2, 3, 4"),
        ({"symmetric": False}, "symmetric is False; this version reads True"),
        ({"pattern": "4:8"}, "pattern is '4:8'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            COMPACT.setting(good | change)
