import dataclasses

import pytest
import torch

from sparsekit.errors import CheckpointError
from sparsekit.packing import PACKABLE_BITS, PackedLinear, pack_linear, pack_rows, unpack_linear, unpack_rows
from sparsekit.quant import Grid, QuantizedWeight

OUT, IN, GROUP = 64, 96, 32


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
    packed = pack_linear(weight, checkpoint_format=version)
    assert packed.qweight.shape == (IN * bits // 32, OUT)
    assert packed.qzeros.shape == (IN // GROUP, OUT * bits // 32)
    assert packed.scales.shape == (IN // GROUP, OUT)
    assert {packed.qweight.dtype, packed.qzeros.dtype, packed.g_idx.dtype} == {torch.int32}
    assert packed.scales.dtype == torch.float16
    assert all(tensor.is_contiguous() for tensor in packed.tensors("x").values())
    back = unpack_linear(packed, bits=bits, group_size=GROUP, symmetric=symmetric, checkpoint_format=version)
    assert_same(weight, back)


@pytest.mark.parametrize("bits", PACKABLE_BITS)
def test_version_1_holds_every_zero_point_but_zero(bits):
    base = quantized(bits, symmetric=False)
    zero = torch.arange(base.zero.numel()).remainder(2**bits - 1).add(1).reshape(base.zero.shape).to(torch.uint8)
    weight = dataclasses.replace(base, zero=zero)  # 1 .. 2^bits - 1
    packed = pack_linear(weight, checkpoint_format="gptq")
    assert_same(weight, unpack_linear(packed, bits=bits, group_size=GROUP, symmetric=False))


def test_a_zero_point_of_zero_is_refused_in_version_1_only():
    base = quantized(4, symmetric=False)
    weight = dataclasses.replace(base, zero=base.zero.index_fill(1, torch.tensor([0]), 0))
    with pytest.raises(CheckpointError, match=r"a\.q.*gptq_v2, or quantize symmetrically"):
        pack_linear(weight, name="a.q")
    packed = pack_linear(weight, checkpoint_format="gptq_v2")
    back = unpack_linear(packed, bits=4, group_size=GROUP, symmetric=False, checkpoint_format="gptq_v2")
    assert_same(weight, back)


def test_zero_points_as_readers_expect_them():
    def word(version: str) -> set[int]:
        qzeros = pack_linear(quantized(4), checkpoint_format=version).qzeros
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
    with pytest.raises(CheckpointError, match=f"layers.0.*{bits} bits have no GPTQ layout"):
        pack_linear(quantized(bits), name="layers.0")


@pytest.mark.parametrize("shape", [(64, 40), (48, 96)])
def test_shapes_that_do_not_divide(shape):
    codes = torch.zeros(shape, dtype=torch.uint8)
    grid = Grid(torch.ones(shape[0], 1), torch.full((shape[0], 1), 8.0), 4)
    weight = QuantizedWeight.of(codes, grid, group_size=shape[1], symmetric=True)
    with pytest.raises(CheckpointError, match="multiple of 32"):
        pack_linear(weight)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", PACKABLE_BITS)
def test_cuda_packs_the_same_words(bits):
    weight = quantized(bits)
    there = {f.name: getattr(weight, f.name) for f in dataclasses.fields(weight)}
    there = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in there.items()}
    one, two = pack_linear(weight), pack_linear(QuantizedWeight(**there))
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        assert torch.equal(getattr(one, name), getattr(two, name).cpu())
    assert isinstance(two, PackedLinear)
