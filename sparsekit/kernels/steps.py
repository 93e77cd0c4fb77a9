# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,misc"
"""Learned steps of grids: gradient, moments and update of a weight's steps in one Triton launch.

Each weight is read in 4 + 2 + 1 bytes (master, gradient, mask), beside the 29 of the optimizer's launch.

The reference is `training.grids.learn_`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

from sparsekit.quant import Rounding, code_range, is_odd
from sparsekit.training.grids import LEAST, range_of
from sparsekit.training.update import Rule, Step

GROUPS = 8  # of a program
CHUNK = 128  # entries of a group at a time
WARPS = 4
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds half to even, as torch does
SMALLEST = tl.constexpr(float(torch.finfo(torch.float16).smallest_normal))
LARGEST = tl.constexpr(float(torch.finfo(torch.float16).max))
SHRINK = tl.constexpr(LEAST)


@triton.jit
def _gradient(
    weight, grad, mask, group, inside, step, clip, low, high,
    BITS: tl.constexpr, ODD: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """∂L/∂s of each group."""
    ZERO: tl.constexpr = 2.0 ** (BITS - 1)
    total = tl.zeros([GROUPS], dtype=tl.float32)
    for start in range(0, SIZE, CHUNK):
        at = start + tl.arange(0, CHUNK)
        here = inside[:, None] & (at < SIZE)[None, :]
        place = group[:, None] * SIZE + at[None, :]
        kept = tl.load(mask + place, mask=here, other=0) != 0
        value = tl.load(weight + place, mask=here, other=0.0).to(tl.float32)
        value = tl.div_rn(value, tl.broadcast_to(step[:, None], value.shape))
        if ODD:
            level = tl.minimum(tl.maximum(value, LOWEST - ZERO), HIGHEST - ZERO)
            level = 2 * ((level - 1) * 0.5 + ROUNDER - ROUNDER) + 1
        else:
            level = tl.minimum(tl.maximum(value + ZERO, LOWEST), HIGHEST) + ROUNDER - ROUNDER - ZERO
        slope = tl.where((value >= low) & (value <= high), level - value, level)
        slope = tl.where(kept, slope, 0.0)
        total += tl.sum(tl.load(grad + place, mask=here, other=0.0).to(tl.float32) * clip * slope, axis=1)
    return total


@triton.jit
def _learn(
    weight, grad, mask, step_at, dense_at, first_at, second_at, clip_at, groups, low, high,
    new_first, beta2, new_second, eps, rate, correction,
    BITS: tl.constexpr, ODD: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`GROUPS` groups a program."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = group < groups
    step = tl.load(step_at + group, mask=inside, other=1.0)
    clip = tl.load(clip_at)
    found = _gradient(
        weight, grad, mask, group, inside, step, clip, low, high, BITS, ODD, LOWEST, HIGHEST, SIZE, GROUPS, CHUNK
    )  # fmt: skip
    first = tl.load(first_at + group, mask=inside, other=0.0)
    first = first + new_first * (found - first)
    second = tl.load(second_at + group, mask=inside, other=0.0) * beta2 + new_second * found * found
    root = tl.sqrt_rn(tl.div_rn(second, tl.zeros_like(second) + correction)) + eps
    dense = tl.load(dense_at + group, mask=inside, other=1.0)
    dense = dense * tl.maximum(1 - tl.div_rn(rate * first, root), SHRINK)
    step = tl.minimum(tl.maximum(dense, SMALLEST), LARGEST).to(tl.float16).to(tl.float32)
    tl.store(first_at + group, first, mask=inside)
    tl.store(second_at + group, second, mask=inside)
    tl.store(dense_at + group, dense, mask=inside)
    tl.store(step_at + group, step, mask=inside)


def learn_(state: Mapping[str, Tensor], grad: Tensor, clip: Tensor, rounding: Rounding, rule: Rule, step: Step) -> None:
    """As `training.grids.learn_`, of a gradient [out, in] in the parameter's dtype that is not clipped yet.

    Args:
        state: Of the parameter; its steps are updated.
        grad: Contiguous.
        clip: float32 scalar on the device.
        rounding: How.
        rule: Its betas and eps.
        step: Its number and lr.
    """
    beta1, beta2 = rule.betas
    low, high = range_of(rounding)
    lowest, highest = code_range(rounding.bits, rounding.levels)
    groups = state["step"].numel()
    size = grad.numel() // groups
    with torch.cuda.device_of(grad):
        _learn[(triton.cdiv(groups, GROUPS),)](
            state["dense"], grad, state["mask"].view(torch.int8),
            state["step"], state["step_dense"], state["step_avg"], state["step_avg_sq"], clip,
            groups, low, high,
            1 - beta1, beta2, 1 - beta2, rule.eps, step.lr / (1 - beta1**step.number), 1 - beta2**step.number,
            BITS=rounding.bits,
            ODD=is_odd(rounding.levels),
            LOWEST=float(lowest),
            HIGHEST=float(highest),
            SIZE=size,
            GROUPS=GROUPS,
            CHUNK=min(CHUNK, triton.next_power_of_2(size)),
            num_warps=WARPS,
        )  # fmt: skip
