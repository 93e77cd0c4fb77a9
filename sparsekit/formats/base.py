"""What a storage format is, and the one setting that all integers of a checkpoint share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsekit.checkpoint import BlockState
from sparsekit.errors import CheckpointError
from sparsekit.interchange.engines import EngineNote
from sparsekit.quant import QuantizedWeight
from sparsekit.shelf import Origin
from sparsekit.state import LinearState

_NAMED = 4  # layers an error message names
_REASONS = 3  # it gives, which may count something of each layer


@dataclass(frozen=True, slots=True)
class Setting:
    """What the quantized linears of one checkpoint have in common; it decides who can read them.

    Attributes:
        bits: Of a code.
        group_size: Inputs of a group, -1 for one group a row.
        symmetric: All zero-points are 2^(bits-1).
        act_order: The groups of the inputs are permuted (`desc_act`).
        layout: Which of the format's layouts, as in "gptq" and "gptq_v2".
        complete: Every linear of every block is quantized.
    """

    bits: int
    group_size: int
    symmetric: bool
    act_order: bool
    layout: str
    complete: bool = True


def grid_header(setting: Setting) -> dict[str, Any]:
    """What the header of every format of our own says of the grids."""
    return {"group_size": setting.group_size, "symmetric": setting.symmetric, "act_order": setting.act_order}


class Layouts(Protocol):
    """What of a storage tells whether linears have a layout; see `Storage`."""

    title: str

    def layouts(self, symmetric: bool) -> tuple[str, ...]:
        """The layouts for a grid, the smallest first; the last one holds most."""

    def obstacle(self, state: LinearState, layout: str) -> str | None:
        """Why a linear has no such layout, in words, or None when it has one."""


class Storage(Layouts, Protocol):
    """How a format stores the integers of a linear.

    Attributes:
        title: For messages.
        method: `quant_method` of config.json, by which readers tell formats apart.
        stem: File name of the weights without its ending.
        parts: Tensors of a linear by the suffix after its name, and the field of `ExportBytes` that
            counts them. The first one is always there and marks a quantized linear.
        bits: Of a code, for which there is a layout; a linear may have other obstacles.
        checksums: Whether a checkpoint is read only with the digests that sparsekit wrote.
    """

    title: str
    method: str
    stem: str
    parts: Mapping[str, str]
    bits: tuple[int, ...]
    checksums: bool

    def pack(self, weight: QuantizedWeight, layout: str, mask: Tensor | None = None) -> dict[str, Tensor]:
        """The tensors of a linear by suffix, on the device of its codes; `obstacle` has found nothing.

        Args:
            weight: The integers.
            layout: One of the format's layouts.
            mask: bool [out, in], True = kept, where it is known.
        """

    def unpack(self, found: Mapping[str, Tensor], setting: Setting) -> QuantizedWeight:
        """Inverse of `pack`.

        Raises:
            CheckpointError: A tensor is missing, or shapes and bits do not fit together.
        """

    def mask(self, found: Mapping[str, Tensor]) -> Tensor | None:
        """The mask that the stored tensors themselves tell, bool [out, in], if they do."""

    def config(self, setting: Setting, left_dense: Sequence[str]) -> dict[str, Any]:
        """`quantization_config` of config.json."""

    def companions(self, setting: Setting) -> dict[str, dict[str, Any]]:
        """Further JSON files by name."""

    def setting(self, config: Mapping[str, Any]) -> Setting:
        """What a `quantization_config` says.

        Raises:
            CheckpointError: An unknown version, or something this reader does not know.
        """

    def notes(self, setting: Setting, sparse: bool) -> Iterator[str]:
        """What a user should know; `sparse`: some linears hold a mask."""


@dataclass(frozen=True, slots=True)
class Format:
    """One entry of `export.formats`.

    Attributes:
        name: In recipes, and of the directory.
        storage: How it stores integers; None stores every value as it is.
        engines: Who reads it with a setting; the setting is None without integers.
        origin: Where it was defined.
        doc: About it; the first line is its summary.
    """

    name: str
    storage: Storage | None
    engines: Callable[[Setting | None], list[EngineNote]]
    origin: Origin
    doc: str | None


def untold(storage: Storage, tensors: Mapping[str, Tensor], mask: Tensor | None) -> Tensor | None:
    """The mask that has to lie beside the packed tensors of a linear; None where they tell it, or there is none."""
    told = storage.mask(tensors)
    return None if mask is None or (told is not None and torch.equal(told, mask)) else mask


def find_setting(storage: Layouts, blocks: Iterable[tuple[BlockState, set[str]]], layout: str = "auto") -> Setting:
    """The one setting all quantized linears share.

    Args:
        storage: Of the format.
        blocks: Each block with the names of its Hugging Face tensors.
        layout: One of the format's layouts; "auto" takes the first that every linear has.
    Raises:
        CheckpointError: Linears are quantized differently, one has no such layout, or none is quantized.
    """
    grids: dict[tuple[int, bool], list[str]] = {}
    sizes: dict[int, list[str]] = {}
    problems: dict[str, dict[str, str]] = {}  # of each layout, by linear
    whole_rows, act_order, complete = True, False, True
    for block, names in blocks:
        for state, weight in _quantized(block.linears.values()):
            fused = None
            if f"{state.name}.weight" not in names:
                fused = f"the model stores it inside a fused tensor, for which {storage.title} has no layout"
            grids.setdefault((weight.bits, weight.symmetric), []).append(state.name)
            sizes.setdefault(weight.group_size, []).append(state.name)
            whole_rows &= weight.scale.shape[1] == 1
            act_order |= permuted(weight)
            for option in storage.layouts(weight.symmetric) if layout == "auto" else (layout,):
                if reason := fused or storage.obstacle(state, option):
                    problems.setdefault(option, {})[state.name] = reason
        complete &= all(state.quantized is not None for state in block.linears.values())
        del block  # the next one is made in its room
    options = [option for _, symmetric in grids for option in storage.layouts(symmetric)]
    options = options if layout == "auto" else [layout]
    chosen = next((option for option in options if option not in problems), options[-1]) if grids else layout
    _check(storage.title, grids, {} if whole_rows else sizes, problems.get(chosen, {}))
    (bits, symmetric), group_size = next(iter(grids)), -1 if whole_rows else next(iter(sizes))
    return Setting(bits, group_size, symmetric, act_order, chosen, complete)


def _quantized(states: Iterable[LinearState]) -> Iterator[tuple[LinearState, QuantizedWeight]]:
    return ((state, state.quantized) for state in states if state.quantized is not None)


def permuted(weight: QuantizedWeight) -> bool:
    """Whether the groups are not consecutive inputs (act-order without static groups)."""
    return not torch.equal(weight.group_of.long(), consecutive(weight.group_of, weight.group_size).long())


def consecutive(like: Tensor, group_size: int) -> Tensor:
    """The groups of consecutive inputs, int32, as long as `like` and on its device."""
    return torch.arange(like.numel(), dtype=torch.int32, device=like.device) // group_size


def inexact_scale(weight: QuantizedWeight) -> str | None:
    """Why float16 cannot hold the scales of a checkpoint of others, or None."""
    if weight.scale.dtype == torch.float16 or torch.equal(weight.scale.half().float(), weight.scale.float()):
        return None
    return f"its scales are {str(weight.scale.dtype).removeprefix('torch.')} values that float16 cannot hold exactly"


def _check(
    title: str,
    grids: dict[tuple[int, bool], list[str]],
    sizes: dict[int, list[str]],
    problems: dict[str, str],
) -> None:
    if not grids:
        raise CheckpointError(f"no linear is quantized; {title} export needs a quantizer among the steps")
    if problems:
        reasons = {reason: [name for name, why in problems.items() if why == reason] for reason in problems.values()}
        told = "; ".join(f"{listed(names)}: {reason}" for reason, names in list(reasons.items())[:_REASONS])
        more = len(reasons) - _REASONS
        told += f"; and {more} more reasons of this kind" if more > 0 else ""
        raise CheckpointError(f"no {title} export: {told}")
    if len(grids) > 1:
        kinds = ", ".join(
            f"{bits} bits {'symmetric' if same else 'asymmetric'} ({listed(names)})"
            for (bits, same), names in grids.items()
        )
        raise CheckpointError(f"no {title} export: a checkpoint has one setting, here are {kinds}")
    if len(sizes) > 1:
        kinds = ", ".join(f"group size {size} ({listed(names)})" for size, names in sizes.items())
        raise CheckpointError(f"no {title} export: a checkpoint has one group size, here are {kinds}")


def listed(names: Sequence[str]) -> str:
    """A few names and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
