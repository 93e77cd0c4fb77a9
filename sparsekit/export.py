"""Exports: a Hugging Face directory other software opens, and the true number of its bytes.

Dense: every value as it is, zeros stored. GPTQ: the linears of the blocks as integers in the layout
of `packing`, everything else dense. There is never a `sparsity_config`: the engines that still know
the key refuse to load a model that has one (vllm-project/vllm issue 51190).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparsekit import __version__
from sparsekit.checkpoint import BlockState, write_json, write_tensors
from sparsekit.engines import dense_engines, gptq_engines
from sparsekit.errors import CheckpointError
from sparsekit.gptqformat import FormatChoice, gptq_setting, legacy_config, quantization_config
from sparsekit.hfdir import (
    MARKER,
    MAX_SHARD,
    ShardWriter,
    copy_companions,
    file_digests,
    header_bytes,
    read_config,
    reader_config,
    staged,
)
from sparsekit.packing import PackedLinear, pack_linear
from sparsekit.pattern import Pattern
from sparsekit.sizes import ExportReport, Tally

Blocks = Callable[[int], BlockState]

MASKS = Path("sparsekit") / "masks.safetensors"  # in a folder: loaders read every *.safetensors beside the model
SAME_LOGITS = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}  # of the largest |logit|


class ExportedModel(Protocol):
    """What an export needs of a model; `sparsekit.model.ModelView` offers it."""

    path: Path
    config: Any
    dtype: torch.dtype
    compute_dtype: torch.dtype
    device: torch.device
    blocks: list[str]
    trust_remote_code: bool

    def to_hf(self, index: int, block: BlockState) -> dict[str, Tensor]:
        """A block's tensors under their Hugging Face names, shapes and dtype."""

    def rest_to_hf(self) -> dict[str, Tensor]:
        """The tensors outside the blocks under their Hugging Face names."""


def export_dense(
    view: ExportedModel,
    blocks: Blocks,
    directory: Path,
    *,
    name: str = "",
    patterns: Mapping[str, Pattern] | None = None,
    tokenizer_dir: Path | None = None,
    max_shard: int = MAX_SHARD,
) -> ExportReport:
    """Write the model with the values it computes with, zeros stored, in the original's dtype.

    Args:
        view: The model.
        blocks: State of each block by index.
        directory: Where to; an earlier export there is replaced in one step.
        name: Of the recipe, for `sparsekit.json`.
        patterns: The pattern each linear must hold, by full name; counted once more here.
        tokenizer_dir: Where the tokenizer lies, when not with the model.
        max_shard: Bytes of a weight file.
    Raises:
        CheckpointError: The place cannot be written; nothing is left behind.
        PatternError: A linear breaks its pattern.
    """
    patterns, tally = patterns or {}, Tally()
    with staged(directory, view.path) as target:
        writer = _Writer(ShardWriter(target, max_shard), tally)
        for index in range(len(view.blocks)):
            block = blocks(index)
            for linear, state in block.linears.items():
                tally.record(state, patterns.get(linear))
            writer.dense(view.to_hf(index, block))
        writer.dense(_untied(view.rest_to_hf()))
        notes = _write_companions(view, target, tokenizer_dir or view.path, {})
        files = writer.close(target)
        _write_marker(target, "dense", name, tally, files)
    return ExportReport(
        format="dense",
        directory=directory,
        bytes=tally.bytes,
        parameters=tally.parameters,
        bits_per_weight=None,
        engines=tuple(dense_engines()),
        notes=tuple(notes),
        files=files,
    )


def export_gptq(
    view: ExportedModel,
    blocks: Blocks,
    directory: Path,
    *,
    name: str = "",
    patterns: Mapping[str, Pattern] | None = None,
    tokenizer_dir: Path | None = None,
    max_shard: int = MAX_SHARD,
    checkpoint_format: FormatChoice = "auto",
) -> ExportReport:
    """Write the model with its quantized linears in the GPTQ layout.

    Args:
        view: The model.
        blocks: State of each block by index; called twice for every block.
        directory: Where to; an earlier export there is replaced in one step.
        name: Of the recipe, for `sparsekit.json`.
        patterns: The pattern each linear must hold, by full name; counted once more here.
        tokenizer_dir: Where the tokenizer lies, when not with the model.
        max_shard: Bytes of a weight file.
        checkpoint_format: "auto" writes version 1 for symmetric grids, which every reader takes, and
            version 2 for asymmetric ones.
    Raises:
        CheckpointError: A layer has no such layout, found before anything is written, or the place
            cannot be written; nothing is left behind.
        PatternError: A linear breaks its pattern.
    """
    setting = gptq_setting(_named_blocks(view, blocks), checkpoint_format)
    patterns, tally = patterns or {}, Tally()
    left_dense: list[str] = []
    with staged(directory, view.path) as target:
        writer = _Writer(ShardWriter(target, max_shard), tally)
        for index in range(len(view.blocks)):
            block = blocks(index)
            tensors = view.to_hf(index, block)
            for linear, state in block.linears.items():
                tally.record(state, patterns.get(linear))
                if state.quantized is None:
                    left_dense.append(linear)
                    continue
                del tensors[f"{linear}.weight"]
                packed = pack_linear(state.quantized, checkpoint_format=setting.checkpoint_format, name=linear)
                writer.packed(linear, packed, state.quantized.codes.numel())
            writer.dense(tensors)
        writer.dense(_untied(view.rest_to_hf()))
        config = {"quantization_config": quantization_config(setting, left_dense)}
        notes = _write_companions(view, target, tokenizer_dir or view.path, config)
        write_json(target / "quantize_config.json", legacy_config(setting))
        _write_masks(target, tally)
        files = writer.close(target)
        _write_marker(target, setting.checkpoint_format, name, tally, files)
    return ExportReport(
        format=setting.checkpoint_format,
        directory=directory,
        bytes=tally.bytes,
        parameters=tally.parameters,
        bits_per_weight=tally.bits_per_weight,
        engines=tuple(gptq_engines(setting)),
        notes=(*notes, *_gptq_notes(tally, left_dense)),
        files=files,
    )


def verify_dense(directory: Path, tokens: Tensor, logits: Tensor, view: ExportedModel) -> float:
    """Open a dense export with plain Transformers and compare its logits.

    Args:
        directory: Of the export.
        tokens: int [batch, seq_len].
        logits: [batch, seq_len, vocabulary], what the model computed for them.
        view: The model that was exported; its compute dtype and device are used.
    Returns:
        The largest absolute difference. It is 0 where the same kernels see the same values, as in
        float32 on a CPU; the tolerance (`SAME_LOGITS`) is for devices that choose kernels by memory.
    Raises:
        CheckpointError: The directory does not load, or computes something else.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=view.compute_dtype,
            local_files_only=True,
            trust_remote_code=view.trust_remote_code,
            attn_implementation=view.config._attn_implementation,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"Transformers cannot open the export {directory}: {error}") from error
    model = model.to(view.device).eval()
    with torch.inference_mode():
        found = model(input_ids=tokens.to(view.device), use_cache=False).logits
    difference = float((found.float() - logits.to(found.device).float()).abs().max())
    allowed = SAME_LOGITS[view.compute_dtype] * float(logits.abs().max())
    if not difference <= allowed:  # also when it is NaN
        raise CheckpointError(f"{directory} computes other logits than the run: they differ by up to {difference:.3g}")
    return difference


class _Writer:
    """Shards and their count, filled together."""

    def __init__(self, shards: ShardWriter, tally: Tally) -> None:
        self._shards = shards
        self._tally = tally

    def dense(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._shards.add(name, tensor)
            self._tally.add_dense(tensor)

    def packed(self, name: str, packed: PackedLinear, weights: int) -> None:
        for key, tensor in packed.tensors(name).items():
            self._shards.add(key, tensor)
        self._tally.add_packed(packed, weights)

    def close(self, target: Path) -> dict[str, dict[str, Any]]:
        paths = self._shards.close()
        self._tally.check(sum(map(header_bytes, paths)), sum(path.stat().st_size for path in paths))
        return file_digests(target, paths)


def _named_blocks(view: ExportedModel, blocks: Blocks) -> Iterator[tuple[BlockState, set[str]]]:
    """Every block with the names its tensors get."""
    for index in range(len(view.blocks)):
        block = blocks(index)
        yield block, set(view.to_hf(index, block))


def _untied(rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without the second name of one that is tied; Transformers ties them again."""
    kept: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in rest.items():
        kept.setdefault((tensor.data_ptr(), tensor.shape), name)
    return {name: rest[name] for name in kept.values()}


def _write_companions(
    view: ExportedModel, target: Path, tokenizer: Path, extra: Mapping[str, Any]
) -> list[str]:
    """config.json, generation_config.json and the tokenizer; returns remarks."""
    raw = read_config(view.path)
    config, notes = reader_config(raw, view.dtype)
    write_json(target / "config.json", {**config, **extra})
    return notes + copy_companions(view.path, tokenizer, target, code="auto_map" in raw)


def _write_masks(target: Path, tally: Tally) -> None:
    if tally.masks:
        shapes = {name: tally.layers[name]["shape"] for name in tally.masks}
        write_tensors(target / MASKS, tally.masks, {"shapes": json.dumps(shapes), "bit_order": "little"})
        tally.bytes.masks = (target / MASKS).stat().st_size


def _write_marker(
    target: Path, written: str, name: str, tally: Tally, files: Mapping[str, Mapping[str, Any]]
) -> None:
    """sparsekit.json: what this directory is, and the digests that tell whether it still is."""
    versions = {"sparsekit": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    about = {"recipe": name, "format": written, "versions": versions, "files": files, "linears": tally.layers}
    masks = {"masks": str(MASKS)} if tally.masks and (target / MASKS).exists() else {}
    write_json(target / MARKER, {**about, **masks})


def _gptq_notes(tally: Tally, left_dense: Sequence[str]) -> Iterator[str]:
    yield (
        "readers multiply codes by float16 scales in their own precision; the run rounds the products to the "
        "model's dtype: the same integers and scales, logits that differ in the last bits"
    )
    if tally.masks:
        yield "the zeros of the pattern are stored as ordinary codes: no smaller and no faster than dense integers"
    if left_dense:
        yield f"{len(left_dense)} linears inside the blocks stay dense: {', '.join(left_dense)}"
