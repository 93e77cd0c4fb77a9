"""What the optimizer holds of one parameter: at first, and after one step in whatever precision it is held.

Plain torch, on the rows of the parameter that are here. State of a sparse parameter: `dense` (W), `mask`,
`initial_mask`, `exp_avg`, `exp_avg_sq` and, with activation-aware scores, `importance` [in]; with grids what
`grids.first_step` makes, with scales of rows what `scaling.first_scale` does. An ordinary parameter that is
not of the masters' dtype has a `dense` master too. float8 moments are flat, `exp_avg_sq` holds the root of v,
`SCALE_OF` tells where their scales are, and `initial_mask` is packed to bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sparsekit.pattern import Pattern
from sparsekit.training.grids import first_step, fitted, group_of, learn_, on_grid
from sparsekit.training.lowbits import (
    Memory,
    blocks_of,
    packed_bits,
    random_bits,
    step_key,
    stochastic_bfloat16,
    stochastic_float8,
    widened,
)
from sparsekit.training.scaling import check_parts, first_scale, split_gradient
from sparsekit.training.update import Rule, Step, adamw_, widest

State = dict[str, Tensor]

SCALE_OF = {"exp_avg": "exp_avg_scale", "exp_avg_sq": "exp_avg_sq_scale"}
MOMENTS = {*SCALE_OF, *SCALE_OF.values(), "scale_avg", "scale_avg_sq", "step_avg", "step_avg_sq"}


def first_state(
    name: str,
    parameter: Tensor,
    mask: Tensor | None,
    given: Tensor,
    pattern: Pattern,
    rule: Rule,
    memory: Memory,
) -> State:
    """State before the first step.

    Args:
        name: For messages.
        parameter: [out, in] where it is sparse, of any shape else; decides the device.
        mask: bool [out, in], True = kept; None for an ordinary parameter.
        given: Its dense values, shaped as the parameter.
        pattern: Of the mask.
        rule: Says whether there are grids or scales of rows.
        memory: Precision of the state.
    Raises:
        MethodError: Groups of a grid, or parts of a row with a scale, do not divide the rows.
    """
    device, state = parameter.device, State()
    if mask is not None:
        first = mask.to(device)
        state["mask"] = first.clone(memory_format=torch.contiguous_format)
        state["initial_mask"] = packed_bits(first) if memory.states == "float8" else state["mask"].clone()
        if rule.rounding is not None:
            size = group_of(rule.rounding, name, parameter.shape[1])
            state |= first_step(fitted(given.to(device), first, rule.rounding, size), learned=rule.learned)
        if rule.scaling:
            check_parts(name, parameter.shape[1], rule.scaling, pattern)
            state |= first_scale(parameter, rule.scaling)
    # float64 parameters, of tests only, keep float64 state
    master = parameter.dtype if parameter.dtype == torch.float64 else memory.master_dtype
    if mask is not None or parameter.dtype != master:
        state["dense"] = given.detach().to(device, master, copy=True).contiguous()
    for key in SCALE_OF:
        if memory.states == "float8":
            state[key] = torch.zeros(parameter.numel(), dtype=torch.float8_e4m3fn, device=device)
            state[SCALE_OF[key]] = torch.zeros(blocks_of(parameter.numel()), device=device)
        else:
            state[key] = torch.zeros_like(parameter.detach(), dtype=widest(parameter.dtype))
    return state


def computed(state: Mapping[str, Tensor], rule: Rule, *, masked: bool, rounded: bool) -> Tensor:
    """The dense weight [...], or what of it the model computes with; scales of rows are not in it.

    Args:
        state: With `dense`.
        rule: Of the grids.
        masked: The model computes with W ⊙ M.
        rounded: It computes with that put on the grids of now.
    """
    weight = state["dense"]
    if rounded and rule.rounding is not None and "step" in state:
        return on_grid(weight, state["mask"], state["step"], rule.rounding)
    return weight.masked_fill(~state["mask"], 0.0) if "mask" in state and masked else weight


def update_(
    state: State,
    parameter: Tensor,
    grad: Tensor,
    index: int,
    rule: Rule,
    memory: Memory,
    step: Step,
    *,
    masked: bool,
    rounded: bool,
) -> None:
    """One step of the state, in place; the reference of the fused kernel in every precision.

    Args:
        state: As `first_state` makes it.
        parameter: What the model computes with; written only where the state has no `dense`.
        grad: float32 [...], clipped already; float64 for float64 parameters.
        index: Of the parameter among all of them; decides its random bits.
        rule: The update rule.
        memory: Precision of the state.
        step: The numbers of this step.
        masked: See `computed`.
        rounded: See `computed`.
    """
    if rounded and "step_dense" in state and rule.rounding is not None:
        learn_(state, grad, rule.rounding, rule.betas, rule.eps, step.lr, step.number)
    if "scale" in state:
        grad, of_scale = split_gradient(grad, computed(state, rule, masked=masked, rounded=rounded), state["scale"])
        moments = state["scale_avg"], state["scale_avg_sq"]
        adamw_(state["scale"], of_scale, *moments, None, rule, replace(step, weight_decay=0.0))
    weight, mask = state["dense"] if "dense" in state else parameter.detach(), state.get("mask")
    if memory.plain:
        adamw_(weight, grad, state["exp_avg"], state["exp_avg_sq"], mask, rule, step)
        return
    for_moments, for_weight = random_bits(step_key(memory.seed, step.number), index, weight.numel(), weight.device)
    wide, first, second = weight.float(), state["exp_avg"], state["exp_avg_sq"]
    if memory.states == "float8":
        first = widened(first, state["exp_avg_scale"]).reshape(weight.shape)
        second = widened(second, state["exp_avg_sq_scale"]).square_().reshape(weight.shape)
    adamw_(wide, grad, first, second, mask, rule, step)
    if memory.states == "float8":
        for key, value, bits in (
            ("exp_avg", first, for_moments),
            ("exp_avg_sq", second.sqrt(), for_moments >> 16),
        ):
            codes, scale = stochastic_float8(value.flatten(), bits, keep_positive=key == "exp_avg_sq")
            state[key].copy_(codes)
            state[SCALE_OF[key]].copy_(scale)
    weight.copy_(wide if weight.dtype == torch.float32 else stochastic_bfloat16(wide, for_weight))
