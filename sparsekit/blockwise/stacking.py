"""States moved between devices, and states of linears with one input put on top of one another.

A method whose rows do not depend on one another solves query, key and value as fast as one of them
alone, if they are handed over as one linear: a sweep waits for its columns, not for its rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from sparsekit.blockwise.activations import free_memory
from sparsekit.checkpoint import BlockState
from sparsekit.errors import MethodError, PluginError
from sparsekit.method import Method
from sparsekit.state import LinearState
from sparsekit.stats import Statistic

STACK_SHARE = 0.125  # of the free device memory that a stack at work may take
STACK_BYTES = 46  # of a weight at work, as in `planning.memory_model.SWEEP`
STACKING = ("cuda",)  # where the matrix products of a stack are not promised to have the bits of its parts'


def sent(state: LinearState, device: torch.device) -> LinearState:
    """The state with its tensors on a device."""
    quantized = state.quantized
    if quantized is not None:
        tensors = {key: getattr(quantized, key).to(device) for key in ("codes", "scale", "zero", "group_of")}
        quantized = replace(quantized, **tensors)
    mask = None if state.mask is None else state.mask.to(device)
    dense = None if state.dense is None else state.dense.to(device)
    branch = None if state.branch is None else state.branch.to(device)
    return replace(state, source=state.source.to(device), mask=mask, quantized=quantized, dense=dense, branch=branch)


def placed(block: BlockState, device: torch.device) -> BlockState:
    """The block with its tensors on a device."""
    linears = {name: sent(state, device) for name, state in block.linears.items()}
    return BlockState(linears, {name: value.to(device) for name, value in block.params.items()})


def stackable(states: Sequence[LinearState], free: int) -> bool:
    """Whether they may be handed over as one: more than one, of one kind, and not too large.

    Args:
        states: Linears with one input, on one device.
        free: Bytes of device memory that are free.
    """
    masked = {state.mask is None for state in states}
    size = sum(state.source.numel() for state in states)
    return (
        len(states) > 1
        and all(plain(s) for s in states)
        and len(masked) == 1
        and size * STACK_BYTES <= STACK_SHARE * free
    )


def stacked(states: Sequence[LinearState]) -> LinearState:
    """One linear with the rows of all of them."""
    masks = [state.mask for state in states if state.mask is not None]
    name = ", ".join(state.name for state in states)
    return LinearState(name, torch.cat([s.source for s in states]), torch.cat(masks) if masks else None)


def parted(whole: LinearState, states: Sequence[LinearState]) -> Iterator[LinearState]:
    """The result of each linear out of the stack's; what was noted of the stack holds for all."""
    start = 0
    for state in states:
        stop = start + len(state.source)
        rows = slice(start, stop)
        quantized = whole.quantized
        if quantized is not None:
            own = {key: getattr(quantized, key)[rows].clone() for key in ("codes", "scale", "zero")}
            quantized = replace(quantized, **own)
        yield replace(
            state,
            source=whole.source[rows].clone(),
            mask=None if whole.mask is None else whole.mask[rows].clone(),
            quantized=quantized,
            notes=(*state.notes, *whole.notes),
        )
        start = stop


def plain(state: LinearState) -> bool:
    """Whether a linear is its values and a mask, and nothing else."""
    return state.quantized is None and state.dense is None and state.branch is None


def pieces(state: LinearState, weights: int | None) -> Iterator[LinearState]:
    """A plain linear a few rows at a time, not copied; as it is where `weights`, at a time, are None or all of them."""
    rows = len(state.source) if weights is None else max(1, weights // state.source.shape[1])
    if rows >= len(state.source):
        yield state
        return
    for start in range(0, len(state.source), rows):
        here = slice(start, start + rows)
        yield replace(state, source=state.source[here], mask=None if state.mask is None else state.mask[here])


def joined(state: LinearState, parts: Sequence[LinearState]) -> LinearState:
    """What a method has made of a linear out of what it has made of its rows; the first part's notes hold for all."""
    first, quantized = parts[0], parts[0].quantized
    if len(parts) == 1:
        return first
    if quantized is not None:
        rows = [each.quantized for each in parts if each.quantized is not None]
        codes, scale, zero = (torch.cat([getattr(part, key) for part in rows]) for key in ("codes", "scale", "zero"))
        quantized = replace(quantized, codes=codes, scale=scale, zero=zero)
    return replace(
        state,
        source=torch.cat([each.source for each in parts]),
        mask=None if first.mask is None else torch.cat([each.mask for each in parts if each.mask is not None]),
        quantized=quantized,
        notes=first.notes,
    )


def at_once(
    method: Method,
    states: Sequence[LinearState],
    arguments: Sequence[Mapping[str, Any]],
    statistic: Statistic | None,
) -> list[tuple[LinearState, float]] | None:
    """A method's results for linears with one input, handed over as one, and the seconds of each.

    Args:
        method: Of scope linear.
        states: On one device.
        arguments: For each of them.
        statistic: Of their input.
    Returns:
        None where they must go one by one: their rows mind, they are of different kinds, or the stack
        failed; then the layer is named and repaired as ever.
    """
    if statistic is None or statistic.tokens == 0 or len(states) < 2:
        return None
    device = states[0].source.device
    if any(other != arguments[0] for other in arguments) or not method.by_rows(arguments[0]):
        return None
    if device.type not in STACKING or not stackable(states, free_memory(device)):
        return None
    start = time.perf_counter()
    try:
        whole = method.guarded(stacked(states), statistic, **arguments[0])
    except (MethodError, PluginError, torch.OutOfMemoryError):
        return None
    seconds = (time.perf_counter() - start) / len(whole.source)
    return [(state, seconds * len(state.source)) for state in parted(whole, states)]
