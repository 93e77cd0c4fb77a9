"""sparsekit-compact: every bit against a slow writer, every integer back, every other file refused by name."""

import dataclasses

import pytest
import torch

from sparsekit.checkpoint import BlockState
from sparsekit.errors import CheckpointError
from sparsekit.formats.base import Setting, find_setting
from sparsekit.formats.compact import INTEGER, ODD, SIX, STORED, TERNARY, Compact
from sparsekit.quant import QuantizedWeight
from sparsekit.state import LinearState

COMPACT = Compact()
KINDS = [(levels, bits) for levels, allowed in STORED.items() for bits in allowed]


def made(levels: str, bits: int, shape=(6, 96), group: int = 16, symmetric: bool = True) -> LinearState:
    """A linear of random integers; `bits` are those that are stored."""
    random = torch.Generator().manual_seed(bits)
    width = bits + (levels in (ODD, SIX))
    zero = torch.full((shape[0], shape[1] // group), 2 ** (width - 1), dtype=torch.uint8)
    if not symmetric:
        zero = torch.randint(0, 2**width, zero.shape, generator=random).to(torch.uint8)
    codes = torch.randint(0, {TERNARY: 3, SIX: 6}.get(levels, 2**bits), shape, generator=random).to(torch.uint8)
    codes = {ODD: 2 * codes + 1, SIX: 2 * codes + 3, TERNARY: codes + 1, INTEGER: codes}[levels]
    scale = torch.rand(zero.shape, generator=random).add(0.1).half()
    groups = torch.arange(shape[1], dtype=torch.int32) // group
    weight = QuantizedWeight(codes, scale, zero, groups, width, group, symmetric)
    return LinearState("a.q", weight.dequantize(), None, weight)


def setting(*states: LinearState) -> Setting:
    """As a reader learns it."""
    linears = {f"{state.name}{index}": state for index, state in enumerate(states)}
    blocks = [(BlockState(linears, {}), {"a.q.weight"})]
    return COMPACT.setting(COMPACT.config(find_setting(COMPACT, blocks), []))


def slow(state: LinearState, levels: str) -> list[list[int]]:
    """The bytes of values, by Python's own integers."""
    weight, rows = state.quantized, []
    for codes in weight.codes.tolist():
        if levels == TERNARY:
            fives = [codes[start : start + 5] for start in range(0, len(codes), 5)]
            rows.append([sum((code - 1) * 3**place for place, code in enumerate(five)) for five in fives])
        elif levels == SIX:
            order = {level: index for index, level in enumerate((-5, -3, -1, 1, 3, 5))}
            threes = [codes[start : start + 3] for start in range(0, len(codes), 3)]
            rows.append([sum(order[code - 8] * 6**place for place, code in enumerate(three)) for three in threes])
        else:
            bits = weight.bits - (levels == ODD)
            held = [code >> 1 if levels == ODD else code for code in codes]
            stream = sum(code << bits * place for place, code in enumerate(held))
            rows.append(list(stream.to_bytes(len(codes) * bits // 8, "little")))
    return rows


@pytest.mark.parametrize("columns", [16, 48, 80, 128])
@pytest.mark.parametrize(("levels", "bits"), KINDS)
def test_every_byte_is_the_slow_writers(levels, bits, columns):
    state = made(levels, bits, (5, columns))
    packed = COMPACT.pack(state.quantized, levels)
    assert packed["values"].tolist() == slow(state, levels)
    assert packed.keys() == {"values", "scales"}
    assert all(tensor.is_contiguous() for tensor in packed.values())


@pytest.mark.parametrize("columns", [16, 32, 48, 64, 80, 96])
@pytest.mark.parametrize(("levels", "bits"), KINDS)
def test_levels_are_found_and_every_integer_comes_back(levels, bits, columns):
    """Also with one group a row, when only the bytes tell how long a row is."""
    for group in (16, columns):
        state = made(levels, bits, (6, columns), group)
        found = setting(state)
        assert (found.layout, found.bits) == (levels, state.quantized.bits)
        assert COMPACT.config(found, [])["bits"] == bits
        packed = COMPACT.pack(state.quantized, levels)
        assert COMPACT.unpack(packed, found).equal(state.quantized)
        assert COMPACT.mask(packed) is None


@pytest.mark.parametrize("bits", STORED[INTEGER])
def test_asymmetric_grids_and_permuted_groups_come_back(bits):
    state = made(INTEGER, bits, symmetric=False)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    weight = dataclasses.replace(state.quantized, group_of=state.quantized.group_of[order])
    packed = COMPACT.pack(weight, INTEGER)
    assert packed.keys() == set(COMPACT.parts)
    assert COMPACT.unpack(packed, setting(state.with_quantized(weight))).equal(weight)


@pytest.mark.parametrize(
    ("levels", "bits", "expected"),
    [(ODD, 1, 1.125), (TERNARY, 2, 1.725), (ODD, 2, 2.125), (SIX, 3, 8 / 3 + 0.125), (INTEGER, 3, 3.125)],
)
def test_bits_a_weight_with_groups_of_128(levels, bits, expected):
    state = made(levels, bits, (16, 5 * 3072), group=128)
    stored = 8 * sum(tensor.nbytes for tensor in COMPACT.pack(state.quantized, levels).values())
    assert stored / state.source.numel() == pytest.approx(expected)


def changed(state: LinearState, code: int) -> LinearState:
    codes = state.quantized.codes.clone()
    codes[2, 3] = code
    return state.with_quantized(dataclasses.replace(state.quantized, codes=codes))


def test_one_linear_that_has_other_levels_decides_for_all():
    assert setting(made(ODD, 1), made(ODD, 1)).layout == ODD
    assert setting(made(ODD, 1), made(TERNARY, 2)).layout == TERNARY
    assert setting(made(ODD, 1), made(TERNARY, 2), made(INTEGER, 2)).layout == INTEGER
    assert setting(changed(made(TERNARY, 2), 0)).layout == INTEGER
    assert setting(changed(made(ODD, 2), 2)).layout == INTEGER  # 3 bits then
    assert setting(made(SIX, 3), made(SIX, 3)).layout == SIX
    assert setting(made(SIX, 3), made(ODD, 3)).layout == ODD
    assert setting(changed(made(SIX, 3), 15)).layout == ODD
    assert setting(changed(made(SIX, 3), 8)).layout == INTEGER


def test_what_has_no_layout_is_refused_by_name():
    told = {
        "codes are an even number": (changed(made(ODD, 2), 2), ODD),
        "codes stand for -2": (changed(made(TERNARY, 2), 0), TERNARY),
        "codes are more than 5 steps from zero": (changed(made(SIX, 3), 1), SIX),
        "codes are an even number of steps": (changed(made(SIX, 3), 12), SIX),
        "5 bits have no sparsekit-compact layout with levels six": (made(ODD, 4), SIX),
        "3 bits have no sparsekit-compact layout with levels ternary": (made(ODD, 2), TERNARY),
        "5 bits have no sparsekit-compact layout with levels integer": (made(ODD, 4), INTEGER),
        "its 24 inputs are not a multiple of 16": (made(ODD, 2, (4, 24), 8), ODD),
    }
    for message, (state, layout) in told.items():
        assert message in COMPACT.obstacle(state, layout)
    assert COMPACT.layouts(False) == (INTEGER,)


@pytest.mark.parametrize(
    ("levels", "bits", "columns", "codes", "rest"),
    [(TERNARY, 2, 96, 243, 3), (SIX, 3, 64, 216, 6)],  # 96 = 5 * 19 + 1, 64 = 3 * 21 + 1
)
def test_files_that_were_never_written_are_refused(levels, bits, columns, codes, rest):
    state = made(levels, bits, (6, columns))
    packed, found = COMPACT.pack(state.quantized, levels), setting(state)
    values = packed["values"]
    wrong = {
        f"holds {codes}; .* codes, 0..{codes - 1}": values.clone().fill_(codes),
        "more weights at the end": torch.cat((values[:, :-1], values[:, -1:].clone().fill_(rest)), 1),
        "make": values[:, :-1].contiguous(),
        "expected a matrix": values.int(),
    }
    for message, tensor in wrong.items():
        with pytest.raises(CheckpointError, match=message):
            COMPACT.unpack({**packed, "values": tensor}, found)
    good = COMPACT.config(found, [])
    for change, message in (
        ({"levels": "even"}, "levels is 'even'"),
        ({"bits": 4}, "bits is 4"),
        ({"symmetric": False}, "symmetric is False"),
        ({"version": 2}, "version is 2"),
    ):
        with pytest.raises(CheckpointError, match=message):
            COMPACT.setting({**good, **change})
