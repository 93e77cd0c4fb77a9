"""Packing on CUDA gives the words that the CPU gives; only sparsekit-coded leaves the device for it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparsekit.formats import FORMATS
from sparsekit.formats.base import Setting
from sparsekit.pattern import Pattern
from sparsekit.quant import Grid, QuantizedWeight

pytestmark = pytest.mark.gpu

OUT, IN, GROUP = 256, 512, 128
STORAGES = {name: form.storage for name, form in FORMATS.items() if form.storage is not None}


def integers(symmetric: bool, bits: int = 4) -> tuple[QuantizedWeight, torch.Tensor]:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
    mask = Pattern(2, 4).keep(weight.abs())
    grouped = (weight * mask).reshape(OUT, -1, GROUP)
    grid = Grid.fit(grouped, bits, symmetric=symmetric)
    codes = grid.encode(grouped).reshape(OUT, IN)
    return QuantizedWeight.of(codes, grid, group_size=GROUP, symmetric=symmetric), mask


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", STORAGES)
def test_cuda_packs_and_unpacks_the_same(name, symmetric):
    storage, (weight, mask) = STORAGES[name], integers(symmetric)
    layout = storage.layouts(symmetric)[-1]
    here, there = storage.pack(weight, layout, mask), storage.pack(weight.to("cuda"), layout, mask.cuda())
    assert here.keys() == there.keys()
    for suffix, tensor in there.items():
        assert tensor.is_cuda, suffix
        assert torch.equal(here[suffix], tensor.cpu()), suffix
    setting = storage.setting(storage.config(Setting(4, GROUP, symmetric, False, layout), []))
    found = storage.unpack({suffix: tensor.cuda() for suffix, tensor in there.items()}, setting)
    assert all(getattr(found, field).is_cuda for field in ("codes", "scale", "zero", "group_of"))
    assert weight.equal(found.to("cpu"))


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_cuda_packs_other_widths_the_same(bits):
    weight, _ = integers(True, bits)
    storage = STORAGES["gptq"]
    one, two = storage.pack(weight, "gptq"), storage.pack(weight.to("cuda"), "gptq")
    assert all(torch.equal(tensor, two[suffix].cpu()) for suffix, tensor in one.items())


def test_a_permuted_index_packs_the_same():
    weight, mask = integers(True)
    order = torch.randperm(IN // 4, generator=torch.Generator().manual_seed(1))
    columns = (4 * order.unsqueeze(1) + torch.arange(4)).flatten()  # whole groups of four, so that 2:4 stays
    moved = dataclasses.replace(weight, codes=weight.codes[:, columns], group_of=weight.group_of[columns])
    for name in ("gptq", "compressed-tensors", "sparsekit-24"):
        storage = STORAGES[name]
        layout = storage.layouts(True)[-1]
        one = storage.pack(moved, layout, mask[:, columns])
        two = storage.pack(moved.to("cuda"), layout, mask[:, columns].cuda())
        assert all(torch.equal(tensor, two[suffix].cpu()) for suffix, tensor in one.items())


@pytest.mark.parametrize(("levels", "bits"), [("odd", 1), ("odd", 2), ("six", 3), ("integer", 3), ("ternary", 2)])
def test_compact_codes_of_every_weight_pack_and_unpack_the_same(levels, bits):
    weight, _ = integers(True, bits + (levels in ("odd", "six")))
    random = torch.randint(0, {"six": 6, "ternary": 3}.get(levels, 2**bits), weight.codes.shape)
    codes = {"odd": 2 * random + 1, "six": 2 * random + 3, "ternary": random + 1, "integer": random}[levels]
    codes = codes.to(torch.uint8)
    weight, storage = dataclasses.replace(weight, codes=codes), STORAGES["sparsekit-compact"]
    one, two = storage.pack(weight, levels), storage.pack(weight.to("cuda"), levels)
    assert all(torch.equal(tensor, two[suffix].cpu()) for suffix, tensor in one.items())
    assert weight.equal(storage.unpack(two, Setting(weight.bits, GROUP, True, False, levels)).to("cpu"))


@pytest.mark.parametrize(
    ("levels", "bits"), [("odd", 1), ("odd", 2), ("odd", 3), ("odd", 4), ("six", 3), ("integer", 2), ("integer", 3)]
)
def test_compact_widths_pack_and_unpack_the_same(levels, bits):
    weight, mask = integers(True, bits + (levels in ("odd", "six")))
    if levels != "integer":
        first, last = (3, 13) if levels == "six" else (1, 2 ** (bits + 1) - 1)
        random = torch.randint(0, (last - first) // 2 + 1, mask.shape, generator=torch.Generator().manual_seed(1))
        codes = torch.where(mask, 2 * random + first, 2**bits).to(torch.uint8)
        weight = dataclasses.replace(weight, codes=codes)
    storage = STORAGES["sparsekit-24-compact"]
    one, two = storage.pack(weight, levels, mask), storage.pack(weight.to("cuda"), levels, mask.cuda())
    assert all(torch.equal(tensor, two[suffix].cpu()) for suffix, tensor in one.items())
    found = storage.unpack(two, Setting(weight.bits, GROUP, True, False, levels))
    assert found.codes.is_cuda
    assert weight.equal(found.to("cpu"))
    assert torch.equal(storage.mask(two).cpu(), storage.mask(one))
