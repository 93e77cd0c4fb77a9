"""Integer grids of a model in training: the model computes with what its weights will be stored as.

Each group of inputs of a sparse weight has a step s. The model computes with Q(W) ⊙ M, Q(w) the nearest
level of the group; the dense W stays in the optimizer and the gradient goes straight through to every
entry of it. Steps are fitted to the kept values of W, and learned from there: what reaches the parameter
tells ∂L/∂s too. They are float16 values in float32, so a checkpoint of the integers holds them exactly,
and dequantized integers are the parameters bit for bit.

Source of the learned steps: Esser et al. 2020, "Learned Step Size Quantization", arXiv:1902.08153, Eq. 3.
Deviations: Adam moves a step by a share of itself, so the gradient needs no factor; weights beyond the
range keep their gradient.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor

from sparsekit.errors import MethodError
from sparsekit.pattern import Pattern
from sparsekit.quant import (
    Grid,
    Levels,
    QuantizedWeight,
    Rounding,
    code_range,
    is_odd,
    resolve_group_size,
    store_scale,
)

LEAST = 0.5  # a step shrinks to no less of itself at once, whatever the rate
SEARCHED = 3  # bits up to which, on an integer grid, a clipped range is searched for


def rounding_of(bits: int, group_size: int, levels: Levels) -> Rounding:
    """How kept weights are put on grids.

    Args:
        bits: That tell a kept weight. A grid without a level at 0 has one more, see `quant`.
        group_size: -1 for one group a row.
        levels: `integer`: -2^(bits-1)..2^(bits-1)-1; `odd`: ±1, ±3, ..., ±(2^bits - 1); `six`: ±1, ±3, ±5, of
            3 bits; `ternary`: -1, 0, 1, of 2.
    """
    odd = is_odd(levels)
    return Rounding(bits + odd, group_size, mse=odd or bits <= SEARCHED, levels=levels)


def bits_per_weight(rounding: Rounding, pattern: Pattern, size: int) -> float:
    """What a weight takes: kept codes, their positions in the group of M, a float16 step for each group of inputs.

    Positions are stored as in sparsekit-24, one by one: 1 bit a weight at 2:4. Ternary weights are told five
    to a byte, pruned ones by their 0. Six levels are told three to a byte, and a group of 2:4 with its positions
    by one.

    Args:
        rounding: How.
        pattern: N:M, or nothing pruned.
        size: Inputs of a group of a step.
    """
    if rounding.levels == "ternary":
        return 8 / 5 + 16 / size
    if rounding.levels == "six" and pattern == Pattern(2, 4):
        return 8 / 4 + 16 / size
    code = 8 / 3 if rounding.levels == "six" else rounding.bits - is_odd(rounding.levels)
    positions = (pattern.m - 1).bit_length() if pattern.sparsity else 0
    return (1 - pattern.sparsity) * (code + positions) + 16 / size


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
    grid = Grid.of_scale(step, rounding.bits, levels=rounding.levels)
    return grid.round(weight.float().reshape(shape), mask.reshape(shape)).reshape(weight.shape)


def integers(weight: Tensor, mask: Tensor, step: Tensor, rounding: Rounding) -> QuantizedWeight:
    """The integers that `on_grid` stands for; arguments as there."""
    shape = (*step.shape, -1)
    grid = Grid.of_scale(step, rounding.bits, levels=rounding.levels)
    codes = grid.encode(weight.float().reshape(shape), mask.reshape(shape)).reshape(weight.shape)
    return QuantizedWeight.of(codes, grid, group_size=weight.shape[1] // step.shape[1], symmetric=True)


def first_step(fitted_step: Tensor, *, learned: bool) -> dict[str, Tensor]:
    """State of the steps [out, groups]: those the model computes with and, if learned, their masters and moments."""
    state = {"step": fitted_step}
    if learned:
        state["step_dense"] = fitted_step.clone()
        state |= {key: torch.zeros_like(fitted_step) for key in ("step_avg", "step_avg_sq")}
    return state


@torch.no_grad()
def learn_(
    state: MutableMapping[str, Tensor],
    grad: Tensor,
    rounding: Rounding,
    betas: tuple[float, float],
    eps: float,
    lr: float,
    number: int,
) -> None:
    """One Adam update of a parameter's steps, in place; the reference of the kernel in `kernels.steps`.

    With q the level of w in steps and v = w / s, each kept w of a group adds grad · (q - v) to ∂L/∂s where
    v is in the range, and grad · q beyond it. The range ends half a level after the last one. Then

        m ← β1 m + (1 - β1) ∂L/∂s,   u ← β2 u + (1 - β2) (∂L/∂s)²
        s ← s · (1 - lr · m̂ / (sqrt(û) + eps)),   m̂ and û corrected for their start

    Args:
        state: `dense` [out, in], `mask`, and what `first_step` has made.
        grad: float32 [out, in], clipped already.
        rounding: How.
        betas: Of the moments.
        eps: Added to the root.
        lr: Learning rate, as of the weights.
        number: 1 for the first step of the run.
    """
    step, shape = state["step"], (*state["step"].shape, -1)
    weight, kept = state["dense"].float().reshape(shape), state["mask"].reshape(shape)
    grid = Grid.of_scale(step, rounding.bits, levels=rounding.levels)
    level = grid.encode(weight, kept) - grid.zero.unsqueeze(-1)
    value = weight / step.unsqueeze(-1)
    low, high = range_of(rounding)
    inside = (value >= low) & (value <= high)
    slope = torch.where(inside, level - value, level).masked_fill(~kept, 0.0)
    of_step = (grad.float().reshape(shape) * slope).sum(-1)
    beta1, beta2 = betas
    state["step_avg"].lerp_(of_step, 1 - beta1)
    state["step_avg_sq"].mul_(beta2).addcmul_(of_step, of_step, value=1 - beta2)
    root = (state["step_avg_sq"] / (1 - beta2**number)).sqrt_().add_(eps)
    share = 1 - lr / (1 - beta1**number) * state["step_avg"] / root
    state["step_dense"].mul_(share.clamp_(min=LEAST))
    step.copy_(store_scale(state["step_dense"]))


def range_of(rounding: Rounding) -> tuple[float, float]:
    """The range of a grid in steps, half a level beyond the first and the last one."""
    lowest, highest = code_range(rounding.bits, rounding.levels)
    zero, half = 2 ** (rounding.bits - 1), 1.0 if is_odd(rounding.levels) else 0.5
    return lowest - zero - half, highest - zero + half
