# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,misc"
"""A block of columns of a sweep in one Triton launch: the masks, the codes and the errors.

Rows are independent, so a program owns a few of them and walks the columns. It looks back instead of
ahead: a column is read once, when its turn comes, and everything the settled columns moved onto it is
one sum over the errors, which stay in registers. So no column is updated twice and none is written
before it is final.

The reference is `solve.solve_block`.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

from sparsekit.pattern import Pattern
from sparsekit.quant import Grid

ROWS = 8  # of a program: 4 lanes share a row, so a sum takes two exchanges and 32 registers hold the errors
WARPS = 1  # several would meet at a barrier in every column
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds half to even, as torch does


@triton.jit
def _moved(lost, factor, column, settled, before, down, across):
    """What the settled columns move onto a column, [rows]."""
    share = tl.load(factor + settled * down + column * across, mask=settled < before, other=0.0)
    return tl.sum(lost * share[:, None], axis=0)


@triton.jit
def _choice(scores, member, N: tl.constexpr, M: tl.constexpr):
    """1 where a score [members, rows] is among the N highest of its M; ties keep the lowest index."""
    beaten = tl.zeros(scores.shape, dtype=tl.int32)
    for k in range(M):
        rival = tl.sum(tl.where(member == k, scores, 0.0), axis=0)[None, :]
        beaten += ((rival > scores) | ((rival == scores) & (k < member))).to(tl.int32)
    return (beaten < N).to(tl.int32)


@triton.jit
def _code(value, step, origin, levels):
    """`Grid.encode`."""
    code = tl.clamp(tl.div_rn(value, step) + origin, 0.0, levels, propagate_nan=tl.PropagateNan.ALL)
    return code + ROUNDER - ROUNDER


@triton.jit
def _settle(
    weight, error, keep, codes, factor, scale, zero, rows, down, across, levels,
    CHOOSE: tl.constexpr, MASKED: tl.constexpr, ROUND: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    MEMBERS: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`rows` is also the stride of a column; `factor` is read at row * down + column * across."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    settled = tl.arange(0, PADDED)
    member = tl.arange(0, MEMBERS)[:, None]
    lost = tl.zeros([PADDED, ROWS], dtype=tl.float32)  # e of the settled columns, 0 for the others
    for start in range(0, COLUMNS, M):
        group = tl.zeros([MEMBERS, ROWS], dtype=tl.float32)  # the group as it is now
        choice = tl.zeros([MEMBERS, ROWS], dtype=tl.int32)
        if CHOOSE:
            scores = tl.full([MEMBERS, ROWS], -1.0, dtype=tl.float32)
            for k in range(M):
                at = (start + k) * rows + row
                value = tl.load(weight + at, mask=inside, other=0.0)
                value -= _moved(lost, factor, start + k, settled, start, down, across)
                pivot = tl.load(factor + (start + k) * (down + across))
                group = tl.where(member == k, value[None, :], group)
                scores = tl.where(member == k, tl.div_rn(tl.abs(value), pivot)[None, :], scores)
            choice = _choice(scores, member, N, M)
        for k in range(M):
            column = start + k
            at = column * rows + row
            pivot = tl.load(factor + column * (down + across))
            if CHOOSE:
                own = tl.sum(tl.where(member == k, group, 0.0), axis=0)
                kept = tl.sum(tl.where(member == k, choice, 0), axis=0) != 0
                tl.store(keep + at, kept.to(tl.int8), mask=inside)
            else:
                own = tl.load(weight + at, mask=inside, other=0.0)
                own -= _moved(lost, factor, column, settled, column, down, across)
                kept = inside
                if MASKED:
                    kept = tl.load(keep + at, mask=inside, other=0) != 0
            value = own
            if ROUND:
                step = tl.load(scale + at, mask=inside, other=1.0)
                origin = tl.load(zero + at, mask=inside, other=0.0)
                code = tl.where(kept, _code(own, step, origin, levels), origin)
                value = (code - origin) * step
                tl.store(codes + at, code, mask=inside)
            value = tl.where(kept, value, 0.0)
            gone = tl.div_rn(own - value, pivot)
            lost = tl.where((settled == column)[:, None], gone[None, :], lost)
            tl.store(weight + at, value, mask=inside)
            tl.store(error + at, gone, mask=inside)
            if CHOOSE:
                ahead = tl.arange(0, MEMBERS)
                later = (ahead > k) & (ahead < M)
                share = tl.load(factor + column * down + (start + ahead) * across, mask=later, other=0.0)
                group -= gone[None, :] * share[:, None]


def settle_(
    weight: Tensor,
    error: Tensor,
    factor: Tensor,
    *,
    keep: Tensor | None,
    codes: Tensor | None,
    pattern: Pattern | None,
    grid: Grid | None,
) -> None:
    """As `solve.solve_block`, but everything it finds is written in place.

    Args:
        weight: float32 [columns, out], contiguous; becomes q.
        error: The same shape; becomes e.
        factor: Diagonal block of U, float32 [columns, columns] with any strides.
        keep: bool [columns, out]: read, or written when `pattern` chooses; None when all are kept.
        codes: float32 [columns, out], written; None without rounding.
        pattern: N:M, with whole groups in the block.
        grid: Scale and zero-point of every entry, [columns, out].
    """
    columns, rows = weight.shape
    flags = error if keep is None else keep.view(torch.int8)
    steps, zeros = (error, error) if grid is None else (grid.scale, grid.zero)
    size = pattern.m if pattern else 1
    with torch.cuda.device_of(weight):
        _settle[(triton.cdiv(rows, ROWS),)](
            weight,
            error,
            flags,
            error if codes is None else codes,
            factor,
            steps,
            zeros,
            rows,
            factor.stride(0),
            factor.stride(1),
            0.0 if grid is None else float(2**grid.bits - 1),
            CHOOSE=pattern is not None,
            MASKED=keep is not None,
            ROUND=grid is not None,
            N=pattern.n if pattern else 1,
            M=size,
            MEMBERS=triton.next_power_of_2(size),
            COLUMNS=columns,
            PADDED=triton.next_power_of_2(columns),
            ROWS=ROWS,
            num_warps=WARPS,
        )
