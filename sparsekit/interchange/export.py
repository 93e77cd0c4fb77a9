"""Exports: a Hugging Face directory other software opens, and the true number of its bytes.

What is particular to a format is in `sparsekit.formats`; here is what all have in common: shards,
configuration, tokenizer, masks, digests, and the proof that what was written reads back. There is
never a `sparsity_config`: the engines that still know the key refuse to load a model that has one
(vllm-project/vllm issue 51190).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor

from sparsekit import __version__
from sparsekit.checkpoint import BlockState
from sparsekit.files import write_json, write_tensors
from sparsekit.formats.base import Format, Setting, Storage, find_setting, untold
from sparsekit.interchange.adapter import adapter_notes, branches_of, write_adapter
from sparsekit.interchange.hfdir import (
    MARKER,
    MAX_SHARD,
    ShardWriter,
    copy_companions,
    header_bytes,
    read_config,
    reader_config,
    staged,
)
from sparsekit.interchange.imports import MASKS
from sparsekit.interchange.proof import integers_on, read_back
from sparsekit.interchange.since import recorded
from sparsekit.interchange.sizes import ExportReport, Tally
from sparsekit.models.arch import Form
from sparsekit.pattern import Pattern
from sparsekit.state import LinearState

Blocks = Callable[[int], BlockState]
Files = Mapping[str, Mapping[str, Any]]  # size and sha256 by name


class ExportedModel(Protocol):
    """What an export needs of a model; `sparsekit.models.view.ModelView` offers it."""

    path: Path
    config: Any
    dtype: torch.dtype
    compute_dtype: torch.dtype
    device: torch.device
    blocks: list[str]
    trust_remote_code: bool

    def to_hf(self, index: int, block: BlockState) -> dict[str, Tensor]:
        """A block's tensors under their Hugging Face names, shapes and dtype."""

    def form(self, linear: str) -> Form:
        """How the Hugging Face model stores a linear."""

    def rest_to_hf(self) -> dict[str, Tensor]:
        """The tensors outside the blocks under their Hugging Face names."""


def export_as(
    storage_format: Format,
    view: ExportedModel,
    blocks: Blocks,
    directory: Path,
    *,
    name: str = "",
    patterns: Mapping[str, Pattern] | None = None,
    tokenizer_dir: Path | None = None,
    max_shard: int = MAX_SHARD,
    layout: str = "auto",
) -> ExportReport:
    """Write the model in one of the formats, and read its integers back before it takes its place.

    Args:
        storage_format: Of `sparsekit.formats`.
        view: The model; integers are packed on its device.
        blocks: State of each block by index; called up to three times for every block.
        directory: Where to; an earlier export there is replaced in one step.
        name: Of the recipe, for `sparsekit.json`.
        patterns: The pattern each linear must hold, by full name; counted once more here.
        tokenizer_dir: Where the tokenizer lies, when not with the model.
        max_shard: Bytes of a weight file.
        layout: One of the format's layouts; "auto" lets the format choose.
    Raises:
        CheckpointError: A layer has no such layout, found before anything is written, or the place
            cannot be written, or it reads back differently; nothing is left behind.
        PatternError: A linear breaks its pattern.
    """
    storage, tally = storage_format.storage, Tally()
    setting = None if storage is None else find_setting(storage, _named_blocks(view, blocks), layout)
    branches = branches_of(blocks, view.form, len(view.blocks), opened=storage is None)
    with staged(directory, view.path) as target:
        writer = _Writer(ShardWriter(target, max_shard, "model" if storage is None else storage.stem), tally)
        about = patterns or {}, writer, storage, setting
        left_dense = [
            name for index in range(len(view.blocks)) for name in _write_block(view, index, blocks(index), *about)
        ]
        writer.dense(_untied(view.rest_to_hf()))
        extra: dict[str, Any] = {}
        if storage is not None and setting is not None:
            extra = {"quantization_config": storage.config(setting, left_dense)}
            for file, content in storage.companions(setting).items():
                write_json(target / file, content)
        notes = _write_companions(view, target, tokenizer_dir or view.path, extra)
        masks = _write_masks(target, tally)
        if branches:
            ours = storage is not None and storage.checksums  # PEFT, for which floats are written, does not read it
            small = ours and all(branch.integers is not None for branch in branches.values())
            tally.bytes.adapter = write_adapter(target, branches, view.dtype, integers=small)
            tally.parameters += sum(branch.parameters for branch in branches.values())
            notes += adapter_notes(branches, tally.bytes.adapter, integers=small)
        files = writer.close(target)
        written = storage_format.name if setting is None else _written(storage_format, setting)
        _write_marker(target, written, name, tally, files, masks)
        if storage is not None and setting is not None:
            read_back(target, view, blocks)
            notes += [*storage.notes(setting, bool(tally.masks)), *_dense_note(left_dense)]
    return ExportReport(
        format=written,
        directory=directory,
        bytes=tally.bytes,
        parameters=tally.parameters,
        bits_per_weight=tally.bits_per_weight,
        linears=tally.linears,
        engines=tuple(storage_format.engines(setting)),
        origin=storage_format.origin,
        notes=tuple(notes),
        files=files,
    )


def _written(storage_format: Format, setting: Setting) -> str:
    """What the format is called in reports: with its layout where that has a name of its own."""
    return setting.layout if setting.layout.startswith(storage_format.name) else storage_format.name


def _write_block(
    view: ExportedModel,
    index: int,
    block: BlockState,
    patterns: Mapping[str, Pattern],
    writer: _Writer,
    storage: Storage | None,
    setting: Setting | None,
) -> list[str]:
    """Write a block; returns its linears that are not stored as integers."""
    dense: dict[str, LinearState] = {}
    for linear, stored in block.linears.items():
        state = integers_on(view.device, stored)
        writer.tally.record(state, patterns.get(linear))
        mask = state.mask  # which lies beside the weights where they do not tell it
        if storage is None or setting is None or state.quantized is None:
            dense[linear] = stored
            writer.tally.add_left(stored.source.numel(), view.dtype.itemsize)
        else:
            packed = storage.pack(state.quantized, setting.layout, state.mask)
            writer.packed(linear, packed, storage.parts, state.quantized.codes.numel())
            mask = untold(storage, packed, mask)
        if mask is not None:
            writer.tally.add_mask(linear, mask)
    writer.dense(view.to_hf(index, BlockState(dense, block.params)))
    return list(dense)


class _Writer:
    """Shards and their count, filled together."""

    def __init__(self, shards: ShardWriter, tally: Tally) -> None:
        self._shards = shards
        self.tally = tally

    def dense(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._shards.add(name, tensor)
            self.tally.add_dense(tensor)

    def packed(self, name: str, tensors: Mapping[str, Tensor], parts: Mapping[str, str], weights: int) -> None:
        for suffix, tensor in tensors.items():
            self._shards.add(f"{name}.{suffix}", tensor)
        self.tally.add_packed(tensors, parts, weights)

    def close(self, target: Path) -> Files:
        files = self._shards.close()
        headers = sum(header_bytes(target / name) for name in files)
        self.tally.check(headers, sum(about["bytes"] for about in files.values()))
        return files


def _named_blocks(view: ExportedModel, blocks: Blocks) -> Iterator[tuple[BlockState, set[str]]]:
    """Every block with the names its weights get, those of fused tensors left out."""
    for index in range(len(view.blocks)):
        block = blocks(index)
        names = {f"{name}.weight" for name in block.linears if view.form(name) != "expert"}
        yield block, names
        del block


def _untied(rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without the second name of one that is tied; Transformers ties them again."""
    kept: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in rest.items():
        kept.setdefault((tensor.data_ptr(), tensor.shape), name)
    return {name: rest[name] for name in kept.values()}


def _write_companions(view: ExportedModel, target: Path, tokenizer: Path, extra: Mapping[str, Any]) -> list[str]:
    """config.json, generation_config.json and the tokenizer; returns remarks."""
    raw = read_config(view.path)
    config, notes = reader_config(raw, view.dtype)
    write_json(target / "config.json", {**config, **extra})
    return notes + copy_companions(view.path, tokenizer, target, code="auto_map" in raw)


def _write_masks(target: Path, tally: Tally) -> Files:
    """Write the masks that no tensor tells, where there are any."""
    if not tally.masks:
        return {}
    shapes = {name: tally.layers[name]["shape"] for name in tally.masks}
    digest = write_tensors(target / MASKS, tally.masks, {"shapes": json.dumps(shapes), "bit_order": "little"})
    tally.bytes.masks = (target / MASKS).stat().st_size
    return {str(MASKS): {"bytes": tally.bytes.masks, "sha256": digest}}


def _write_marker(target: Path, written: str, name: str, tally: Tally, files: Files, masks: Files) -> None:
    """sparsekit.json: what this directory is, and the digests that tell whether it still is."""
    versions = {"sparsekit": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    about = {"recipe": name, "format": written, "versions": versions, "files": files, "linears": tally.layers}
    where = {"masks": str(MASKS)} if masks else {}
    write_json(target / MARKER, {**about, **where, **recorded(target, files, masks)})


def _dense_note(left_dense: Sequence[str]) -> Iterator[str]:
    if left_dense:
        yield f"{len(left_dense)} linears inside the blocks stay dense: {', '.join(left_dense)}"
