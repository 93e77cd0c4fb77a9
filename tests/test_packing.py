import dataclasses

import pytest
import torch

from sparsekit.errors import CheckpointError
from sparsekit.formats.base import Setting
from sparsekit.formats.gptq import PACKABLE_BITS, Gptq
from sparsekit.formats.packing import pack_padded, pack_rows, unpack_padded, unpack_rows
from sparsekit.quant import Grid, QuantizedWeight
from sparsekit.state import LinearState

OUT, IN, GROUP = 64, 96, 32
GPTQ = Gptq()


def pack_linear(weight: QuantizedWeight, layout: str = "gptq") -> dict[str, torch.Tensor]:
    return GPTQ.pack(weight, layout)


def unpack_linear(
    packed: dict[str, torch.Tensor], *, bits: int, group_size: int, symmetric: bool, layout: str = "gptq"
) -> QuantizedWeight:
    return GPTQ.unpack(packed, Setting(bits, group_size, symmetric, False, layout))


def obstacle(weight: QuantizedWeight, layout: str = "gptq") -> str | None:
    return GPTQ.obstacle(LinearState("a.q", weight.dequantize(), quantized=weight), layout)


def quantized(bits: int, symmetric: bool = True, group: int = GROUP, seed: int = 0) -> QuantizedWeight:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))
    grouped = weight.reshape(OUT, -1, group)
    grid = Grid.fit(grouped, bits, symmetric=symmetric)
    codes = grid.encode(grouped).reshape(OUT, IN)
    return QuantizedWeight.of(codes, grid, group_size=group, symmetric=symmetric)


def assert_same(one: QuantizedWeight, two: QuantizedWeight) -> None:
    for field in dataclasses.fields(QuantizedWeight):
        left, right = getattr(one, field.name), getattr(two, field.name)
        if isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype, field.name
            assert torch.equal(left, right), field.name
        else:
            assert left == right, field.name


@pytest.mark.parametrize("bits", PACKABLE_BITS)
@pytest.mark.parametrize(("symmetric", "version"), [(True, "gptq"), (True, "gptq_v2"), (False, "gptq_v2")])
def test_unpacking_is_the_exact_inverse(bits, symmetric, version):
    weight = quantized(bits, symmetric)
    packed = pack_linear(weight, layout=version)
    assert packed["qweight"].shape == (IN * bits // 32, OUT)
    assert packed["qzeros"].shape == (IN // GROUP, OUT * bits // 32)
    assert packed["scales"].shape == (IN // GROUP, OUT)
    assert {packed["qweight"].dtype, packed["qzeros"].dtype, packed["g_idx"].dtype} == {torch.int32}
    assert packed["scales"].dtype == torch.float16
    assert all(tensor.is_contiguous() for tensor in packed.values())
    back = unpack_linear(packed, bits=bits, group_size=GROUP, symmetric=symmetric, layout=version)
    assert_same(weight, back)


@pytest.mark.parametrize("bits", PACKABLE_BITS)
def test_version_1_holds_every_zero_point_but_zero(bits):
    base = quantized(bits, symmetric=False)
    zero = torch.arange(base.zero.numel()).remainder(2**bits - 1).add(1).reshape(base.zero.shape).to(torch.uint8)
    weight = dataclasses.replace(base, zero=zero)  # 1 .. 2^bits - 1
    packed = pack_linear(weight, layout="gptq")
    assert_same(weight, unpack_linear(packed, bits=bits, group_size=GROUP, symmetric=False))


def test_a_zero_point_of_zero_is_refused_in_version_1_only():
    base = quantized(4, symmetric=False)
    weight = dataclasses.replace(base, zero=base.zero.index_fill(1, torch.tensor([0]), 0))
    assert "gptq_v2, or quantize symmetrically" in obstacle(weight)
    assert obstacle(weight, "gptq_v2") is None
    packed = pack_linear(weight, layout="gptq_v2")
    back = unpack_linear(packed, bits=4, group_size=GROUP, symmetric=False, layout="gptq_v2")
    assert_same(weight, back)


def test_zero_points_as_readers_expect_them():
    def word(version: str) -> set[int]:
        qzeros = pack_linear(quantized(4), layout=version)["qzeros"]
        return {value & 0xFFFFFFFF for value in qzeros.flatten().tolist()}

    assert word("gptq") == {0x77777777}
    assert word("gptq_v2") == {0x88888888}


def test_four_bits_low_nibble_first():
    codes = torch.arange(32).remainder(16).reshape(1, 32)
    assert [word & 0xFFFFFFFF for word in pack_rows(codes, 4)[0].tolist()] == [0x76543210, 0xFEDCBA98] * 2


def test_three_bits_by_hand():
    """32 codes in 3 words: code 10 has two bits in word 0 and one in word 1; code 21 one in word 1, two in word 2."""
    codes = torch.zeros(1, 32, dtype=torch.int64)
    codes[0, 0], codes[0, 9], codes[0, 10], codes[0, 11], codes[0, 21], codes[0, 22], codes[0, 31] = 1, 2, 5, 7, 3, 4, 6
    word0 = 1 | 2 << 27 | (5 & 3) << 30
    word1 = 5 >> 2 | 7 << 1 | (3 & 1) << 31
    word2 = 3 >> 1 | 4 << 2 | 6 << 29
    assert [word & 0xFFFFFFFF for word in pack_rows(codes, 3)[0].tolist()] == [word0, word1, word2]
    assert torch.equal(unpack_rows(pack_rows(codes, 3), 3), codes.int())


def test_against_a_slow_bit_stream():
    """Python's own big integers, one row at a time."""
    for bits in PACKABLE_BITS:
        codes = torch.randint(0, 2**bits, (3, 64), generator=torch.Generator().manual_seed(bits))
        for row, words in zip(codes.tolist(), pack_rows(codes, bits).tolist(), strict=True):
            stream = sum(code << (bits * i) for i, code in enumerate(row))
            assert [word & 0xFFFFFFFF for word in words] == [stream >> 32 * i & 0xFFFFFFFF for i in range(2 * bits)]


def test_permuted_groups_and_one_group_a_row():
    order = torch.randperm(IN, generator=torch.Generator().manual_seed(1))
    base = quantized(4)
    weight = dataclasses.replace(base, group_of=base.group_of[order])
    assert_same(weight, unpack_linear(pack_linear(weight), bits=4, group_size=GROUP, symmetric=True))
    whole = quantized(4, group=IN)
    assert_same(whole, unpack_linear(pack_linear(whole), bits=4, group_size=-1, symmetric=True))


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_bits_without_a_layout(bits):
    assert f"{bits} bits have no GPTQ layout" in obstacle(quantized(bits))


@pytest.mark.parametrize("shape", [(64, 40), (48, 96)])
def test_shapes_that_do_not_divide(shape):
    codes = torch.zeros(shape, dtype=torch.uint8)
    grid = Grid(torch.ones(shape[0], 1), torch.full((shape[0], 1), 8.0), 4)
    weight = QuantizedWeight.of(codes, grid, group_size=shape[1], symmetric=True)
    assert "multiple of 32" in obstacle(weight)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_of_any_length(bits):
    codes = torch.randint(0, 2**bits, (3, 37), generator=torch.Generator().manual_seed(bits))
    words = pack_padded(codes, bits)
    assert words.shape == (3, -(-37 * bits // 32))
    assert torch.equal(unpack_padded(words, bits, 37), codes.int())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_version_1_by_others_with_a_zero_point_of_zero(bits):
    """GPTQModel subtracts one from whole words: a 0 borrows from its neighbour, and reading adds it back."""
    base = quantized(bits, symmetric=False)
    weight = dataclasses.replace(base, zero=base.zero.index_fill(0, torch.tensor([0, 5]), 0))
    version_2 = pack_linear(weight, "gptq_v2")
    ones = sum(1 << place for place in range(0, 32, bits))
    words = (version_2["qzeros"].long() - ones) & 0xFFFFFFFF
    version_1 = version_2 | {"qzeros": torch.where(words >= 2**31, words - 2**32, words).int()}
    assert_same(weight, unpack_linear(version_1, bits=bits, group_size=GROUP, symmetric=False))


def test_a_mislabelled_version_is_named():
    with pytest.raises(CheckpointError, match=r"zero-points of 8; here some are 9.*labelled wrongly"):
        unpack_linear(pack_linear(quantized(4), "gptq_v2"), bits=4, group_size=GROUP, symmetric=True, layout="gptq")
