"""Integer grids of a model in training: the model computes with what its weights will be stored as.

Each group of inputs of a sparse weight has a step s, fitted to the kept values of W. The model computes
with Q(W) ⊙ M, Q(w) the nearest level of the group; the dense W stays in the optimizer and the gradient
goes straight through to every entry of it. Steps are float16 values in float32, so a checkpoint of the
integers holds them exactly, and dequantized integers are the parameters bit for bit.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sparsekit.errors import MethodError
from sparsekit.pattern import Pattern
from sparsekit.quant import Grid, QuantizedWeight, Rounding, resolve_group_size

Levels = Literal["integer", "odd"]
SEARCHED = 3  # bits up to which, on an integer grid, a clipped range is searched for


def rounding_of(bits: int, group_size: int, levels: Levels) -> Rounding:
    """How kept weights are put on grids.

    Args:
        bits: That tell a kept weight. An odd grid has one more, see `quant`.
        group_size: -1 for one group a row.
        levels: `integer`: -2^(bits-1)..2^(bits-1)-1; `odd`: ±1, ±3, ..., ±(2^bits - 1).
    """
    odd = levels == "odd"
    return Rounding(bits + odd, group_size, mse=odd or bits <= SEARCHED, odd=odd)


def bits_per_weight(rounding: Rounding, pattern: Pattern, size: int) -> float:
    """What a weight takes: kept codes, their positions in the group of M, a float16 step for each group of inputs.

    Positions are stored as in sparsekit-24, one by one: 1 bit a weight at 2:4.

    Args:
        rounding: How.
        pattern: N:M, or nothing pruned.
        size: Inputs of a group of a step.
    """
    positions = (pattern.m - 1).bit_length() if pattern.sparsity else 0
    return (1 - pattern.sparsity) * (rounding.bits - rounding.odd + positions) + 16 / size


def group_of(rounding: Rounding, name: str, columns: int) -> int:
    """Inputs of a group of a parameter.

    Raises:
        MethodError: They do not divide its rows.
    """
    try:
        return resolve_group_size(rounding.group_size, columns)
    except MethodError as error:
        raise MethodError(str(error), layer=name) from error


def fitted(weight: Tensor, mask: Tensor, rounding: Rounding, size: int) -> Tensor:
    """The steps of a weight's groups.

    Args:
        weight: W [out, in] of any floating dtype.
        mask: bool [out, in], True = kept; only kept values count.
        rounding: How.
        size: Inputs of a group.
    Returns:
        float32 [out, in/size].
    """
    kept = weight.float().masked_fill(~mask, 0.0)
    return rounding.fit(kept.reshape(len(weight), -1, size)).scale


def on_grid(weight: Tensor, mask: Tensor, step: Tensor, rounding: Rounding) -> Tensor:
    """Q(W) ⊙ M, float32 [out, in]; the reference of the fused optimizer's kernel.

    Args:
        weight: W [out, in].
        mask: bool [out, in].
        step: float32 [out, groups].
        rounding: How.
    """
    shape = (*step.shape, -1)  # [out, groups, size]
    grid = Grid.of_scale(step, rounding.bits, odd=rounding.odd)
    return grid.round(weight.float().reshape(shape), mask.reshape(shape)).reshape(weight.shape)


def integers(weight: Tensor, mask: Tensor, step: Tensor, rounding: Rounding) -> QuantizedWeight:
    """The integers that `on_grid` stands for; arguments as there."""
    shape = (*step.shape, -1)
    grid = Grid.of_scale(step, rounding.bits, odd=rounding.odd)
    codes = grid.encode(weight.float().reshape(shape), mask.reshape(shape)).reshape(weight.shape)
    return QuantizedWeight.of(codes, grid, group_size=weight.shape[1] // step.shape[1], symmetric=True)
