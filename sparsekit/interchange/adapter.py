"""Low-rank branches beside an export, as an adapter that PEFT reads.

No architecture of transformers computes S (X x), so a model with branches is two things: the sparse
weights, and an adapter in PEFT's LoRA layout with A = X [in/k, in], B = S [out, in/k] and scaling 1. It
lies in a directory of its own: an `adapter_config.json` beside `config.json` would make transformers
take the whole export for an adapter. Merging it into the weights makes them dense.

Branches that hold integers are written as such where only sparsekit reads the weights too: PEFT's layout
has no integers. Of each linear Sᵀ and X, codes packed along their rows and a float16 step for each group.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.branch import Branch, attach
from sparsekit.checkpoint import BRANCH as PARTS
from sparsekit.checkpoint import HOST, BlockState
from sparsekit.errors import CheckpointError, in_one_line
from sparsekit.files import read_json, read_tensors, write_json, write_tensors
from sparsekit.formats.packing import WORD, pack_padded, unpack_padded
from sparsekit.models.arch import Form
from sparsekit.quant import Grid, QuantizedWeight

ADAPTER = "adapter"  # directory inside an export
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OUR_WEIGHTS, OUR_CONFIG = "lowrank.safetensors", "lowrank.json"  # of branches that hold integers
VERSION = 1
PACKED = (2, 4, 8)  # bits of codes that fill words; others are stored in the next
PREFIX = "base_model.model."  # of every tensor in PEFT's files


def branches_of(
    blocks: Callable[[int], BlockState], form: Callable[[str], Form], count: int, *, opened: bool
) -> dict[str, Branch]:
    """Every branch by linear.

    Args:
        blocks: State of each block by index.
        form: How the Hugging Face model stores a linear.
        count: Blocks.
        opened: Transformers opens the export and is given the branches, as a run does with a dense one.
    Raises:
        CheckpointError: A linear with a branch has no place for it.
    """
    found: dict[str, Branch] = {}
    for index in range(count):
        for name, state in blocks(index).linears.items():
            if state.branch is None:
                continue
            if reason := _no_place(form(name), opened=opened):
                raise CheckpointError(f"{name}: {reason}; leave it out of the step that adds branches")
            found[name] = state.branch
    return found


def _no_place(form: Form, *, opened: bool) -> str | None:
    """Why a linear can have no low-rank branch in an export, in words, or None."""
    if form == "expert":
        return "the model stores it inside a fused tensor, and an adapter has no place for its low-rank branch"
    if form == "transposed" and opened:
        return (
            "Transformers computes it by a Conv1D, which can carry no low-rank branch in a dense export; "
            "export it in a format that sparsekit reads"
        )
    return None


def write_adapter(target: Path, branches: Mapping[str, Branch], dtype: torch.dtype, *, integers: bool = False) -> int:
    """Write the adapter into an export; returns the bytes of its weights.

    Args:
        target: Directory of the export.
        branches: By linear.
        dtype: What values are stored in.
        integers: Store those of the branches, which all hold some.
    """
    directory = target / ADAPTER
    branches = {name: branch.to(HOST) for name, branch in branches.items()}
    if integers:
        return _write_integers(directory, branches)
    tensors: dict[str, Tensor] = {}
    for name, branch in branches.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = branch.projection.to(dtype)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = branch.up.to(dtype)
    write_tensors(directory / WEIGHTS, tensors)
    write_json(directory / CONFIG, peft_config(branches))
    return (directory / WEIGHTS).stat().st_size


def adapter_bytes(branches: Sequence[Branch], stored: int, *, integers: bool) -> int:
    """The tensors of an adapter, in bytes.

    Args:
        branches: Hollow ones will do.
        stored: Bytes of a value.
        integers: The export's weights are read by sparsekit alone.
    """
    if not (integers and all(branch.integers for branch in branches)):
        return stored * sum(branch.up.numel() + branch.up.shape[1] * branch.inputs for branch in branches)
    return sum(tensor.nbytes for branch in branches for held in branch.integers or () for tensor in _packed(held))


def _packed(held: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Codes and steps of a factor as they are stored."""
    width = next(bits for bits in PACKED if bits >= held.bits)
    return pack_padded(held.codes, width), held.scale


def _write_integers(directory: Path, branches: Mapping[str, Branch]) -> int:
    """Write the integers of branches, and read them back.

    Raises:
        CheckpointError: They read back as others.
    """
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for name, branch in branches.items():
        assert branch.integers is not None  # the caller has looked
        about[name] = [{"bits": held.bits, "inputs": held.codes.shape[1]} for held in branch.integers]
        for part, held in zip(PARTS, branch.integers, strict=True):
            tensors[f"{name}.{part}"], tensors[f"{name}.{part}_scales"] = _packed(held)
    write_tensors(directory / OUR_WEIGHTS, tensors)
    write_json(directory / OUR_CONFIG, {"version": VERSION, "branches": about})
    for name, branch in _read_integers(directory).items():
        expected, found = branches[name].integers, branch.integers
        if not (expected and found and all(one.equal(two) for one, two in zip(expected, found, strict=True))):
            raise CheckpointError(f"the low-rank branch of {name} reads back from {directory} as other integers")
    return (directory / OUR_WEIGHTS).stat().st_size


def _read_integers(directory: Path) -> dict[str, Branch]:
    """Inverse of `_write_integers`.

    Raises:
        CheckpointError: A tensor is missing or does not fit, or another version wrote it.
    """
    about, (tensors, _) = read_json(directory / OUR_CONFIG), read_tensors(directory / OUR_WEIGHTS)
    if about.get("version") != VERSION:
        told = f"version is {about.get('version')!r}; this version reads {VERSION}"
        raise CheckpointError(f"{directory / OUR_CONFIG}: {told}")
    branches: dict[str, Branch] = {}
    for name, parts in about["branches"].items():
        pair = []
        for part, setting in zip(PARTS, parts, strict=True):
            bits, count = setting["bits"], setting["inputs"]
            if bits not in range(2, PACKED[-1] + 1) or count < 1:
                raise CheckpointError(f"{directory / OUR_CONFIG}: {name}.{part} has {bits!r} bits and {count} inputs")
            try:
                words, scale = tensors[f"{name}.{part}"], tensors[f"{name}.{part}_scales"]
            except KeyError as error:
                raise CheckpointError(f"{directory} lacks {error}") from error
            width = next(each for each in PACKED if each >= bits)
            if words.shape[1] != -(-count * width // WORD) or count % scale.shape[1]:
                raise CheckpointError(f"{directory}: {name}.{part} and its configuration do not fit")
            grid = Grid.of_scale(scale.float(), bits)
            codes = unpack_padded(words, width, count)
            pair.append(QuantizedWeight.of(codes, grid, group_size=count // scale.shape[1], symmetric=True))
        branches[name] = Branch.of_integers(*pair)
    return branches


def peft_config(branches: Mapping[str, Branch]) -> dict[str, Any]:
    """`adapter_config.json`: each linear by its full name, with its own rank and a scaling of 1."""
    ranks = {name: branch.up.shape[1] for name, branch in branches.items()}
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {f"^{re.escape(name)}$": rank for name, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,  # given by hand: PeftModel.from_pretrained(model, ".../adapter")
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,  # scaling is lora_alpha / r
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": list(ranks),
    }


def attach_adapter(model: nn.Module, directory: Path) -> None:
    """Let a model compute the adapter of an export, as PEFT would; no PEFT is needed.

    Args:
        model: A transformers model of the export's architecture.
        directory: Of the export.
    Raises:
        CheckpointError: The adapter does not fit the model.
    """
    modules = dict(model.named_modules())
    for name, branch in read_adapter(directory).items():
        if name not in modules:
            raise CheckpointError(f"{directory / ADAPTER} does not fit the model: it lacks {name}")
        attach(modules[name], branch)


def read_adapter(directory: Path) -> dict[str, Branch]:
    """The branches of an export by linear.

    Raises:
        CheckpointError: A tensor is missing, a file damaged, or not one of ours.
    """
    place = directory / ADAPTER
    if (place / OUR_CONFIG).is_file():
        try:
            return _read_integers(place)
        except CheckpointError:
            raise
        except Exception as error:  # a configuration may be wrong in any way
            told = f"{type(error).__name__}: {in_one_line(error)}"
            raise CheckpointError(f"{place / OUR_CONFIG} is not one of ours: {told}") from error
    config = read_json(place / CONFIG)
    names = config.get("target_modules") if isinstance(config, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{place / CONFIG} has no target_modules, a list of linears")
    tensors, _ = read_tensors(place / WEIGHTS)
    branches: dict[str, Branch] = {}
    for name in names:
        try:
            down, up = (tensors[f"{PREFIX}{name}.lora_{part}.weight"] for part in "AB")
        except KeyError as error:
            raise CheckpointError(f"{place} lacks {error}") from error
        if down.dim() != 2 or up.dim() != 2 or not len(down) or len(down) != up.shape[1] or down.shape[1] % len(down):
            raise CheckpointError(f"{place}: {name} has branches {list(down.shape)} and {list(up.shape)}, no pair")
        branches[name] = Branch(up, down, length=down.shape[1] // len(down))
    return branches


def adapter_notes(branches: Mapping[str, Branch], size: int, *, integers: bool = False) -> Sequence[str]:
    """What a user must know of an export with an adapter; arguments as those of `write_adapter`."""
    count = sum(branch.up.numel() + branch.projection.numel() for branch in branches.values())
    if integers:
        return [
            f"N:M+LR and not N:M: {len(branches)} linears compute a low-rank branch as well, whose integers are in "
            f"{ADAPTER}/ ({count:,} parameters, {size:,} bytes); without it this is another model"
        ]
    written = [branch for branch in branches.values() if branch.down is None]
    notes = [
        f"2:4+LR and not 2:4: {len(branches)} linears compute a dense low-rank branch as well. It is in {ADAPTER}/ in "
        f"PEFT's LoRA layout ({count:,} parameters, {size:,} bytes); without it this is another model, "
        "and merged into the weights it makes them dense"
    ]
    if written:
        notes.append("X of the branches has no parameters; PEFT's layout has no such form, so it is written out")
    return notes
