import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsekit.checkpoint import BlockState
from sparsekit.errors import CheckpointError
from sparsekit.formats import FORMATS, storage_of
from sparsekit.formats.awq import INVERSE, ORDER, Awq
from sparsekit.formats.base import Setting, Storage, find_setting
from sparsekit.formats.compressed_tensors import PackQuantized
from sparsekit.formats.sparsekit24 import Sparse24
from sparsekit.pattern import Pattern
from sparsekit.quant import Grid, QuantizedWeight
from sparsekit.state import LinearState

STORAGES = {name: form.storage for name, form in FORMATS.items() if form.storage is not None}
OUT, IN, GROUP = 32, 64, 32


def integers(
    shape: tuple[int, int] = (OUT, IN),
    *,
    bits: int = 4,
    group: int = GROUP,
    symmetric: bool = True,
    keep: int = 2,
    seed: int = 0,
) -> LinearState:
    """A linear with at most `keep` weights of every four, quantized; a mask where keep < 4."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    state = LinearState("a.q", weight)
    if keep < 4:
        state = state.masked(Pattern(keep, 4).keep(weight.abs()))
    grouped = state.weight.reshape(shape[0], -1, group)
    grid = Grid.fit(grouped, bits, symmetric=symmetric)
    codes = grid.encode(grouped).reshape(shape)
    return state.with_quantized(QuantizedWeight.of(codes, grid, group_size=group, symmetric=symmetric))


def setting_of(storage: Storage, weight: QuantizedWeight) -> Setting:
    layout = storage.layouts(weight.symmetric)[-1]
    written = Setting(weight.bits, weight.group_size, weight.symmetric, False, layout)
    return storage.setting(storage.config(written, []))  # as a reader learns it


def back(storage: Storage, state: LinearState) -> tuple[dict[str, Tensor], QuantizedWeight]:
    assert storage.obstacle(state, storage.layouts(state.quantized.symmetric)[-1]) is None
    packed = storage.pack(state.quantized, storage.layouts(state.quantized.symmetric)[-1], state.mask)
    assert packed.keys() <= storage.parts.keys() and next(iter(storage.parts)) in packed
    assert all(tensor.is_contiguous() for tensor in packed.values())
    return packed, storage.unpack(packed, setting_of(storage, state.quantized))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [GROUP, IN])
@pytest.mark.parametrize("name", STORAGES)
def test_every_format_gives_back_every_integer(name, group, symmetric):
    state = integers(group=group, symmetric=symmetric)
    assert back(STORAGES[name], state)[1].equal(state.quantized)


@pytest.mark.parametrize("name", sorted(STORAGES.keys() - {"sparsekit-coded"}))  # which has all bits
def test_bits_without_a_layout_are_an_obstacle(name):
    assert "5 bits have no" in STORAGES[name].obstacle(integers(bits=5), STORAGES[name].layouts(True)[-1])


@pytest.mark.parametrize("name", STORAGES)
def test_scales_of_others_are_never_rounded(name):
    state = integers()
    odd = dataclasses.replace(state.quantized, scale=state.quantized.scale.float() * 1.0001)
    told = STORAGES[name].obstacle(state.with_quantized(odd), STORAGES[name].layouts(True)[-1])
    assert "float32 values that float16 cannot hold" in told
    same = dataclasses.replace(state.quantized, scale=state.quantized.scale.float())
    assert STORAGES[name].obstacle(state.with_quantized(same), STORAGES[name].layouts(True)[-1]) is None


@pytest.mark.parametrize("name", STORAGES)
def test_an_unknown_version_or_kind_is_named(name):
    storage = STORAGES[name]
    good = storage.config(Setting(4, 32, True, False, storage.layouts(True)[-1]), [])
    key = {"gptq": "checkpoint_format", "compressed-tensors": "format"}.get(name, "version")
    with pytest.raises(CheckpointError, match=rf"{key} is '?9"):
        storage.setting({**good, key: "9" if isinstance(good[key], str) else 9})
    with pytest.raises(CheckpointError, match="quantization_config"):
        storage.setting({})
    with pytest.raises(CheckpointError, match=r"'awk'; sparsekit reads gptq, awq.*Did you mean 'awq'"):
        storage_of("awk")
    with pytest.raises(CheckpointError, match="quant_method None"):
        storage_of(None)


@pytest.mark.parametrize("name", STORAGES)
def test_missing_and_misshapen_tensors_are_named(name):
    storage, state = STORAGES[name], integers(symmetric=False)
    packed, _ = back(storage, state)
    setting = setting_of(storage, state.quantized)
    for suffix, tensor in packed.items():
        if suffix != "g_idx":  # absent in some files of others: consecutive groups
            with pytest.raises(CheckpointError, match=suffix):
                storage.unpack({key: value for key, value in packed.items() if key != suffix}, setting)
        with pytest.raises(CheckpointError):
            storage.unpack(packed | {suffix: tensor[: len(tensor) // 2]}, setting)
    with pytest.raises(CheckpointError, match="group size 7 does not divide"):
        storage.unpack(packed, dataclasses.replace(setting, group_size=7))
    scales = next(suffix for suffix, role in storage.parts.items() if role == "scales")
    if packed[scales].is_floating_point():  # coded bytes have a test of their own
        with pytest.raises(CheckpointError, match="not all finite"):
            storage.unpack(packed | {scales: packed[scales] * float("nan")}, setting)


@pytest.mark.parametrize("name", ["gptq", "compressed-tensors"])
def test_bits_that_do_not_fit_the_file(name):
    storage, state = STORAGES[name], integers(bits=8)
    packed, _ = back(storage, state)
    with pytest.raises(CheckpointError, match="fit"):
        storage.unpack(packed, dataclasses.replace(setting_of(storage, state.quantized), bits=4))


def permuted(state: LinearState) -> LinearState:
    """The same integers with the groups of an act-order run."""
    order = torch.randperm(IN, generator=torch.Generator().manual_seed(3))
    weight = state.quantized
    moved = dataclasses.replace(weight, group_of=weight.group_of[order], codes=weight.codes[:, order])
    mask = state.mask[:, order]
    return dataclasses.replace(state.with_quantized(moved), mask=mask)


@pytest.mark.parametrize("name", STORAGES)
def test_permuted_groups_are_kept_or_refused(name):
    storage, state = STORAGES[name], permuted(integers(keep=1))
    told = storage.obstacle(state, storage.layouts(True)[-1])
    if name == "awq":
        assert "act-order" in told
    elif told is None:
        assert back(storage, state)[1].equal(state.quantized)
    else:
        assert "more than two weights" in told  # the permutation has broken 2:4


def test_awq_nibbles_as_readers_expect_them():
    codes = torch.arange(8).repeat(4).unsqueeze(1).repeat(1, 32).to(torch.uint8)  # [out, in], code = out mod 8
    grid = Grid(torch.ones(32, 1), torch.full((32, 1), 8.0), 4)
    weight = QuantizedWeight.of(codes, grid, group_size=32, symmetric=True)
    packed = Awq().pack(weight, "gemm")
    assert {word & 0xFFFFFFFF for word in packed["qweight"].flatten().tolist()} == {0x75316420}
    assert [ORDER[place] for place in INVERSE] == list(range(8))
    assert packed["qweight"].shape == (32, 4) and packed["scales"].shape == (1, 32)


def test_pack_quantized_is_gptq_transposed():
    state = integers()
    packed = PackQuantized().pack(state.quantized, "pack-quantized")
    gptq = STORAGES["gptq"].pack(state.quantized, "gptq")
    assert torch.equal(packed["weight_packed"], gptq["qweight"].t())
    assert packed["weight_shape"].tolist() == [OUT, IN]
    assert "weight_zero_point" not in packed
    assert "sparsity_config" not in PackQuantized().config(setting_of(PackQuantized(), state.quantized), [])


def test_pack_quantized_refuses_what_would_be_misread():
    storage = PackQuantized()
    good = storage.config(Setting(4, 32, True, False, "pack-quantized"), [])
    group = good["config_groups"]["group_0"]
    for change, word in (
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is not empty"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"config_groups": {}}, "config_groups is missing"),
        ({"config_groups": {"a": {**group, "input_activations": {"num_bits": 8}}}}, "activations"),
        ({"config_groups": {"a": group, "b": {**group, "weights": {**group["weights"], "num_bits": 8}}}}, "one way"),
    ):
        with pytest.raises(CheckpointError, match=word):
            storage.setting({**good, **change})


def test_sparse_24_takes_three_bits_and_its_scales():
    shape = (32, 1024)
    packed, _ = back(Sparse24(), integers(shape, group=128))
    assert packed.keys() == {"values", "positions", "scales"}
    assert packed["values"].shape == (32, 256) and packed["positions"].shape == (32, 128)
    assert 8 * sum(tensor.nbytes for tensor in packed.values()) / (32 * 1024) == 3.125


def test_sparse_24_by_hand():
    codes = torch.tensor([[8, 3, 8, 15, 1, 8, 8, 8]], dtype=torch.uint8)
    grid = Grid(torch.ones(1, 1), torch.full((1, 1), 8.0), 4)
    weight = QuantizedWeight.of(codes, grid, group_size=8, symmetric=True)
    packed = Sparse24().pack(weight, "v1", torch.tensor([[0, 1, 0, 1, 1, 0, 0, 1]]).bool())
    assert packed["values"].tolist() == [[3 | 15 << 4, 1 | 8 << 4]]
    assert packed["positions"].tolist() == [[(1 | 3 << 2) | (0 | 3 << 2) << 4]]
    assert Sparse24().mask(packed).int().tolist() == [[0, 1, 0, 1, 1, 0, 0, 1]]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), symmetric=st.booleans(), columns=st.sampled_from([8, 16, 40]))
def test_sparse_24_holds_any_group_with_at_most_two_weights(data, symmetric, columns):
    """Groups of 4 with 0, 1 or 2 weights, with any codes, and kept weights that were rounded to zero."""
    rows = 3
    zero = torch.full((rows, columns // 8), 8, dtype=torch.uint8)
    if not symmetric:
        drawn = data.draw(st.lists(st.integers(0, 15), min_size=zero.numel(), max_size=zero.numel()))
        zero = torch.tensor(drawn, dtype=torch.uint8).reshape(zero.shape)
    kept = torch.zeros(rows, columns // 4, 4, dtype=torch.bool)
    for cell in kept.reshape(-1, 4):
        cell[data.draw(st.lists(st.integers(0, 3), max_size=2, unique=True))] = True
    mask = kept.reshape(rows, columns)
    codes = torch.tensor(data.draw(st.lists(st.integers(0, 15), min_size=mask.numel(), max_size=mask.numel())))
    spread = zero.repeat_interleave(8, 1)
    codes = torch.where(mask, codes.reshape(mask.shape).to(torch.uint8), spread)
    scale = torch.rand(zero.shape).add(0.1).half()
    groups = torch.arange(columns, dtype=torch.int32) // 8
    weight = QuantizedWeight(codes, scale, zero, groups, 4, 8, symmetric)
    state = LinearState("a.q", weight.dequantize(), mask, weight)
    packed, found = back(Sparse24(), state)
    assert found.equal(weight)
    stored = Sparse24().mask(packed)
    assert not bool((mask & ~stored).any())  # every kept weight is stored, whatever its code
    assert bool((stored.reshape(rows, -1, 4).sum(-1) == 2).all())


def test_a_refusal_stays_short_where_every_layer_has_a_reason_of_its_own():
    states = [dataclasses.replace(integers((32, 4 * odd), group=4), name=f"{odd}.q") for odd in (1, 3, 5, 7, 9, 11)]
    block = BlockState({state.name: state for state in states}, {})
    with pytest.raises(CheckpointError, match=r"1\.q: its 4 inputs .*; and 3 more reasons of this kind") as told:
        find_setting(Sparse24(), [(block, {f"{name}.weight" for name in block.linears})])
    assert str(told.value).count("not a multiple of 8") == 3


def test_sparse_24_refuses_what_is_not_2_of_4():
    storage, dense = Sparse24(), integers(keep=4)
    assert "groups of 4 hold more than two weights" in storage.obstacle(dense, "v1")
    assert "not a multiple of 8" in storage.obstacle(integers((32, 12), group=12), "v1")
    packed, _ = back(storage, integers())
    falling = packed | {"positions": torch.zeros_like(packed["positions"])}
    with pytest.raises(CheckpointError, match="must rise"):
        storage.unpack(falling, Setting(4, GROUP, True, False, "v1"))


def test_from_gptq_to_sparse_24_and_back_is_lossless():
    state = integers()
    gptq, sparse = STORAGES["gptq"], Sparse24()
    first, read = back(gptq, state)
    found = sparse.unpack(sparse.pack(read, "v1"), setting_of(sparse, read))
    assert all(torch.equal(tensor, gptq.pack(found, "gptq")[key]) for key, tensor in first.items())


def test_engines_are_told_for_every_format():
    for form in FORMATS.values():
        layout = "" if form.storage is None else form.storage.layouts(True)[-1]
        for complete in (True, False):
            for note in form.engines(Setting(4, 64, True, False, layout, complete)):
                assert note.sentence.endswith(".") and note.engine
    assert {note.verdict for note in FORMATS["sparsekit-24"].engines(None) if note.engine != "sparsekit"} == {"refuses"}
