# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,misc"
"""Scales and zero-points of groups in one Triton launch, the search for a clipped range included.

The search tries 80 ranges; in plain torch each is a dozen passes over the weight. Here a group stays in
registers and the cache while all are tried.

The reference is `quant.Grid.fit_reference`.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

from sparsekit.quant import MSE_NORM, MSE_STEPS, Levels, code_range, is_odd

GROUPS = 4  # of a program: 8 lanes share a group, which the search needs 90 registers for (sm_90)
CHUNK = 128  # entries of a group in registers at a time
WARPS = 1
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds half to even, as torch does
SMALLEST = tl.constexpr(float(torch.finfo(torch.float16).smallest_normal))
LARGEST = tl.constexpr(float(torch.finfo(torch.float16).max))
POWER = tl.constexpr(MSE_NORM)


@triton.jit
def _of_range(low, high, highest, middle, SYMMETRIC: tl.constexpr, LOWEST: tl.constexpr):
    """`Grid._of_range`; `highest` is the highest code, `middle` the zero-point of symmetric grids."""
    step = tl.div_rn(high - low, highest - LOWEST)
    step = tl.where(step > 0, step, 1.0)
    scale = tl.minimum(tl.maximum(step, SMALLEST), LARGEST).to(tl.float16).to(tl.float32)
    if SYMMETRIC:
        zero = tl.zeros_like(scale) + middle
    else:
        zero = tl.minimum(tl.maximum(tl.div_rn(-low, scale), 0.0), highest) + ROUNDER - ROUNDER
    return scale, zero


@triton.jit
def _loss(
    weight, group, inside, scale, zero, highest, along,
    ODD: tl.constexpr, LOWEST: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Σ |error|^2.4 of each group."""
    total = tl.zeros_like(scale)
    for start in range(0, SIZE, CHUNK):
        at = start + tl.arange(0, CHUNK)
        here = (at < SIZE)[:, None] & inside[None, :]
        value = tl.load(weight + at[:, None] * along + group[None, :], mask=here, other=0.0)
        code = tl.div_rn(value, tl.broadcast_to(scale[None, :], value.shape))
        if ODD:
            code = tl.minimum(tl.maximum(code, LOWEST - zero[None, :]), highest - zero[None, :])
            code = 2 * ((code - 1) * 0.5 + ROUNDER - ROUNDER) + 1 + zero[None, :]
        else:
            code = tl.minimum(tl.maximum(code + zero[None, :], LOWEST), highest) + ROUNDER - ROUNDER
        error = tl.abs((code - zero[None, :]) * scale[None, :] - value)
        if ODD:
            error = tl.where(value == 0, 0.0, error)  # a pruned one; so are those outside
        lost = tl.where(error > 0, tl.exp2(POWER * tl.log2(tl.where(error > 0, error, 1.0))), 0.0)
        total += tl.sum(lost, axis=0)
    return total


@triton.jit
def _fit(
    weight, scale_out, zero_out, groups, apart, along, highest, middle,
    SYMMETRIC: tl.constexpr, ODD: tl.constexpr, LOWEST: tl.constexpr, STEPS: tl.constexpr,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """An entry is read at group * apart + index * along."""
    number = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = number < groups
    group = number * apart
    low, high = tl.zeros([GROUPS], dtype=tl.float32), tl.zeros([GROUPS], dtype=tl.float32)
    for start in range(0, SIZE, CHUNK):
        at = start + tl.arange(0, CHUNK)
        here = (at < SIZE)[:, None] & inside[None, :]
        value = tl.load(weight + at[:, None] * along + group[None, :], mask=here, other=0.0)
        low = tl.minimum(low, tl.min(value, axis=0))
        high = tl.maximum(high, tl.max(value, axis=0))
    if SYMMETRIC:
        high = tl.maximum(-low, high)
        low = -high
    scale, zero = _of_range(low, high, highest, middle, SYMMETRIC, LOWEST)
    if STEPS > 1:
        loss = _loss(weight, group, inside, scale, zero, highest, along, ODD, LOWEST, SIZE, CHUNK)
        for i in range(1, STEPS):
            shrink = tl.div_rn(tl.full([GROUPS], 100.0, dtype=tl.float32) - i, 100.0)
            trial, origin = _of_range(low * shrink, high * shrink, highest, middle, SYMMETRIC, LOWEST)
            found = _loss(weight, group, inside, trial, origin, highest, along, ODD, LOWEST, SIZE, CHUNK)
            better = found < loss
            loss = tl.where(better, found, loss)
            scale, zero = tl.where(better, trial, scale), tl.where(better, origin, zero)
    tl.store(scale_out + number, scale, mask=inside)
    tl.store(zero_out + number, zero, mask=inside)


def fit(weight: Tensor, bits: int, symmetric: bool, mse: bool, levels: Levels = "integer") -> tuple[Tensor, Tensor]:
    """As `Grid.fit_reference`: scale and zero-point of each leading index, float32 [...].

    Args:
        weight: float32 [groups, group] with any strides, or contiguous [..., group].
    """
    flat = weight if weight.dim() == 2 else weight.reshape(-1, weight.shape[-1])
    groups, size = flat.shape
    lowest, highest = code_range(bits, levels)
    scale, zero = (torch.empty(weight.shape[:-1], dtype=torch.float32, device=weight.device) for _ in range(2))
    with torch.cuda.device_of(weight):
        _fit[(triton.cdiv(groups, GROUPS),)](
            flat,
            scale,
            zero,
            groups,
            flat.stride(0),
            flat.stride(1),
            float(highest),
            float(2 ** (bits - 1)),
            SYMMETRIC=symmetric,
            ODD=is_odd(levels),
            LOWEST=float(lowest),
            STEPS=MSE_STEPS if mse else 1,
            SIZE=size,
            GROUPS=GROUPS,
            CHUNK=min(CHUNK, triton.next_power_of_2(size)),
            num_warps=WARPS,
        )
    return scale, zero
