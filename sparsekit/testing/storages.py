"""What every export format of integers promises, one function for each promise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from sparsekit.errors import CheckpointError, ContractError
from sparsekit.formats.base import Setting, Storage, permuted
from sparsekit.pattern import Pattern
from sparsekit.quant import Grid, QuantizedWeight
from sparsekit.state import LinearState

SHAPE = (32, 64)

StorageCheck = Callable[[Storage], None]


def takes_some(storage: Storage) -> None:
    """It takes some integers, and says in words why it refuses others."""
    states = list(_specimens())
    told = [storage.obstacle(state, layout) for state, layout in _tried(storage, states)]
    if wrong := [reason for reason in told if reason is not None and not (isinstance(reason, str) and reason)]:
        raise ContractError(f"an obstacle is a sentence or None, it gave {wrong[0]!r}")
    if all(told):
        raise ContractError(f"it refuses all of {len(states)} made-up linears; the first: {told[0]}")


def comes_back(storage: Storage) -> None:
    """Every integer, scale and group comes back, of every setting that it does not refuse."""
    for state, setting, packed in _packed(storage):
        weight = _integers(state)
        found = storage.unpack(packed, storage.setting(storage.config(setting, [])))
        if not weight.equal(found):
            parts = ("codes", "zero", "group_of", "bits", "group_size", "symmetric")
            differs = [part for part in parts if not _same(getattr(weight, part), getattr(found, part))]
            about = f"{weight.bits} bits, group size {weight.group_size}, symmetric {weight.symmetric}"
            raise ContractError(
                f"{about}, permuted {permuted(weight)}: {', '.join(differs) or 'scale'} differ when read back"
            )


def repeats(storage: Storage) -> None:
    """The same integers give the same bytes, and are not modified."""
    for state, setting, packed in _packed(storage):
        before = replace(_integers(state), codes=_integers(state).codes.clone())
        again = storage.pack(_integers(state), setting.layout, state.mask)
        if not before.equal(_integers(state)):
            raise ContractError("pack modifies the integers it is given; work on a copy")
        if again.keys() != packed.keys() or not all(torch.equal(packed[name], again[name]) for name in packed):
            raise ContractError("two calls of pack give different tensors")


def misses(storage: Storage) -> None:
    """Without the tensor that marks a linear it raises a CheckpointError."""
    first = next(iter(storage.parts))
    for _, setting, packed in _packed(storage):
        try:
            storage.unpack({name: tensor for name, tensor in packed.items() if name != first}, setting)
        except CheckpointError:
            return
        raise ContractError(f"unpack takes a linear that lacks {first!r}; raise a KeyError or CheckpointError")


STORAGE_CHECKS: tuple[StorageCheck, ...] = (takes_some, comes_back, repeats, misses)


def _specimens() -> Iterator[LinearState]:
    """Made-up 2:4 linears of every number of bits, both kinds of grid, small groups, whole rows and permuted groups."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    mask = Pattern(2, 4).keep(weight.abs())
    for bits, symmetric, group, order in product(range(2, 9), (True, False), (16, SHAPE[1]), (False, True)):
        grouped = (weight * mask).reshape(SHAPE[0], -1, group)
        grid = Grid.fit(grouped, bits, symmetric=symmetric)
        found = QuantizedWeight.of(grid.encode(grouped).reshape(SHAPE), grid, group_size=group, symmetric=symmetric)
        if order:  # fours stay together and one group of inputs is another one's, as an act-order run leaves it
            found = replace(found, group_of=found.group_of.reshape(-1, 4).flip(0).flatten())
            codes = torch.where(mask, found.codes, found.zero[:, found.group_of.long()])
            found = replace(found, codes=codes)
        yield LinearState("specimen", found.dequantize(), mask, found)


def _integers(state: LinearState) -> QuantizedWeight:
    assert state.quantized is not None  # specimens are quantized
    return state.quantized


def _tried(storage: Storage, states: list[LinearState]) -> Iterator[tuple[LinearState, str]]:
    for state in states:
        for layout in storage.layouts(_integers(state).symmetric):
            yield state, layout


def _packed(storage: Storage) -> Iterator[tuple[LinearState, Setting, dict[str, Tensor]]]:
    """Every specimen and layout that is not refused, with its tensors."""
    for state, layout in _tried(storage, list(_specimens())):
        if storage.obstacle(state, layout) is None:
            weight = _integers(state)
            size = -1 if weight.scale.shape[1] == 1 else weight.group_size
            setting = Setting(weight.bits, size, weight.symmetric, permuted(weight), layout)
            yield state, setting, storage.pack(weight, layout, state.mask)


def _same(one: object, two: object) -> bool:
    return torch.equal(one, two) if isinstance(one, Tensor) and isinstance(two, Tensor) else one == two
