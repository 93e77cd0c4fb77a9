"""What every export format of integers promises, one function for each promise."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from sparsekit.checkpoint import BlockState
from sparsekit.errors import CheckpointError, ContractError, PluginError
from sparsekit.files import read_json
from sparsekit.formats.base import Format, Setting, Storage, permuted
from sparsekit.interchange.export import export_as
from sparsekit.interchange.hfdir import MARKER
from sparsekit.interchange.imports import QuantizedFiles
from sparsekit.kept import sha256_file
from sparsekit.models.view import ModelView
from sparsekit.pattern import Pattern
from sparsekit.quant import Grid, QuantizedWeight
from sparsekit.state import LinearState

SHAPE = (32, 64)

FormatCheck = Callable[[Format], None]


def takes_some(form: Format) -> None:
    """It takes and packs some integers, and says in words why it refuses others."""
    storage = storage_of(form)
    states = list(_specimens())
    told = [storage.obstacle(state, layout) for state, layout in _tried(storage, states)]
    if wrong := [reason for reason in told if reason is not None and not (isinstance(reason, str) and reason)]:
        raise ContractError(f"an obstacle is a sentence or None, it gave {wrong[0]!r}")
    if all(told):
        raise ContractError(f"it refuses all of {len(states)} made-up linears; the first: {told[0]}")
    next(_packed(storage))


def comes_back(form: Format) -> None:
    """Every integer, scale and group comes back, of every setting that it does not refuse."""
    storage = storage_of(form)
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


def repeats(form: Format) -> None:
    """The same integers give the same bytes, and are not modified."""
    storage = storage_of(form)
    for state, setting, packed in _packed(storage):
        before = replace(_integers(state), codes=_integers(state).codes.clone())
        again = storage.pack(_integers(state), setting.layout, state.mask)
        if not before.equal(_integers(state)):
            raise ContractError("pack modifies the integers it is given; work on a copy")
        if again.keys() != packed.keys() or not all(torch.equal(packed[name], again[name]) for name in packed):
            raise ContractError("two calls of pack give different tensors")


def misses(form: Format) -> None:
    """Without the tensor that marks a linear it raises a CheckpointError."""
    storage = storage_of(form)
    first = next(iter(storage.parts))
    for _, setting, packed in _packed(storage):
        try:
            storage.unpack({name: tensor for name, tensor in packed.items() if name != first}, setting)
        except CheckpointError:
            return
        raise ContractError(f"unpack takes a linear that lacks {first!r}; raise a KeyError or CheckpointError")


def exported(form: Format) -> None:
    """A model exported in it reads back equal, the digests beside it are right, and damage is refused."""
    storage, view = storage_of(form), ModelView.open("builtin:tiny", dtype="float32")
    blocks = _model(view, storage)
    with tempfile.TemporaryDirectory(prefix="sparsekit-check-") as place:
        directory = Path(place) / "export"
        try:
            export_as(form, view, blocks.__getitem__, directory)
            found = QuantizedFiles(directory)
            for name, state in blocks[0].linears.items():  # export_as itself has held every integer against the files
                if not torch.equal(found[name].weight, state.weight):
                    raise ContractError(f"{name} of an export has other weights than the model")
        except CheckpointError as error:
            raise ContractError(f"an export of a small model fails: {error}") from error
        for file, known in read_json(directory / MARKER)["files"].items():
            if sha256_file(directory / file) != known["sha256"]:
                raise ContractError(f"{MARKER} has another digest of {file} than the file")
        _damage(next(directory.glob("*.safetensors")))
        try:
            QuantizedFiles(directory)
        except CheckpointError:
            return
        raise ContractError("an export with a changed byte is read as if nothing had happened")


def devices(form: Format) -> None:
    """Integers on CUDA give the tensors that they give on a CPU, on CUDA."""
    storage = storage_of(form)
    for state, setting, packed in _packed(storage):
        assert state.mask is not None  # specimens are pruned
        there = storage.pack(_integers(state).to("cuda"), setting.layout, state.mask.to("cuda"))
        for name, tensor in there.items():
            if not tensor.is_cuda:
                raise ContractError(
                    f"{name} of integers on CUDA is on the CPU; create it with device=weight.codes.device"
                )
            if not torch.equal(tensor.cpu(), packed[name]):
                raise ContractError(f"{name} differs between CPU and CUDA")


def documented(form: Format) -> None:
    """The first line of its docstring says what it is."""
    if not (form.doc or "").strip():
        raise ContractError("it has no docstring; its first line stands in the list of sparsekit methods")


FORMAT_CHECKS: tuple[FormatCheck, ...] = (takes_some, comes_back, repeats, misses, exported, devices, documented)


def storage_of(form: Format) -> Storage:
    """How a format stores integers.

    Raises:
        PluginError: It stores none.
    """
    if form.storage is None:
        raise PluginError(
            f"export format {form.name!r} stores every value as it is; each run that writes it opens it again and "
            "compares the logits, so there is nothing to check here"
        )
    return form.storage


def _model(view: ModelView, storage: Storage) -> list[BlockState]:
    """The blocks of a small model, 2:4 and quantized to what the format takes: 4 bits, or the nearest it does."""
    for bits, symmetric in product(sorted(storage.bits, key=lambda bits: abs(bits - 4)), (True, False)):
        blocks = [view.dense_block(index) for index in range(len(view.blocks))]
        blocks = [
            BlockState({name: _rounded(state, bits, symmetric) for name, state in block.linears.items()}, block.params)
            for block in blocks
        ]
        states = [state for block in blocks for state in block.linears.values()]
        if any(all(storage.obstacle(state, way) is None for state in states) for way in storage.layouts(symmetric)):
            return blocks
    raise ContractError("it refuses a small model of every number of bits it names, symmetric or not")


def _rounded(state: LinearState, bits: int, symmetric: bool) -> LinearState:
    """A linear pruned to 2:4 and rounded, in groups of 64."""
    mask = Pattern(2, 4).keep(state.source.abs())
    grouped = (state.source * mask).reshape(len(mask), -1, 64)
    grid = Grid.fit(grouped, bits, symmetric=symmetric)
    codes = grid.encode(grouped).reshape(mask.shape)
    return state.masked(mask).with_quantized(QuantizedWeight.of(codes, grid, group_size=64, symmetric=symmetric))


def _damage(path: Path) -> None:
    """Change the last byte of a file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


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
