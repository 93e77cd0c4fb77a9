# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,misc,assignment"
"""A block of columns of a sweep in one Triton launch: the masks, the codes and the errors.

Rows are independent, so a program owns a few of them and walks the columns, a few a turn. It looks back
instead of ahead: what the columns before the last turn move onto one is a single sum over their errors,
which stay in registers, and is worked out while that turn's columns wait for one another. So a column
is read once, a turn early, and written once.

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
SPAN = 4  # columns of a turn where no pattern says it
WARPS = 1  # several would meet at a barrier in every column
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds half to even, as torch does


@triton.jit
def _picked(tile, member, k):
    """Row k of a tile [members, rows]."""
    return tl.sum(tl.where(member == k, tile, tl.zeros_like(tile)), axis=0)


@triton.jit
def _choice(scores, member, N: tl.constexpr, M: tl.constexpr):
    """1 where a score [members, rows] is among the N highest of its M; ties keep the lowest index."""
    beaten = tl.zeros(scores.shape, dtype=tl.int32)
    for k in range(M):
        rival = _picked(scores, member, k)[None, :]
        beaten += ((rival > scores) | ((rival == scores) & (k < member))).to(tl.int32)
    return (beaten < N).to(tl.int32)


@triton.jit
def _code(value, step, origin, levels):
    """`Grid.encode`."""
    code = tl.clamp(tl.div_rn(value, step) + origin, 0.0, levels, propagate_nan=tl.PropagateNan.ALL)
    return code + ROUNDER - ROUNDER


@triton.jit
def _entries(pointer, start, row, rows, inside, COLUMNS: tl.constexpr, SPAN: tl.constexpr, MEMBERS: tl.constexpr):
    """A tile [members, rows] of a tensor whose columns lie `rows` apart."""
    index = tl.arange(0, MEMBERS)
    there = (index < SPAN) & (start + index < COLUMNS)
    return tl.load(
        pointer + (start + index)[:, None] * rows + row[None, :], mask=there[:, None] & inside[None, :], other=0
    )


@triton.jit
def _shares(factor, start, settled, down, across, COLUMNS: tl.constexpr, SPAN: tl.constexpr):
    """What each column of a group takes of the errors of all columns before the group: a vector for each."""
    found = ()
    for k in tl.static_range(SPAN):
        column = start + k
        known = (settled < start) & (column < COLUMNS)
        share = tl.load(factor + settled * down + column * across, mask=known, other=0.0)
        found = found + (share,)  # noqa: RUF005 - Triton knows no unpacking
    return found


@triton.jit
def _links(factor, start, after, down, across, COLUMNS: tl.constexpr, SPAN: tl.constexpr, MEMBERS: tl.constexpr):
    """What the columns from `after` take of the errors of a group's, [members after, members of the group]."""
    index = tl.arange(0, MEMBERS)
    there = index < SPAN
    own, other = start + index, after + index
    known = (there & (other < COLUMNS))[:, None] & (there & (own < COLUMNS))[None, :] & (own[None, :] <= other[:, None])
    return tl.load(factor + own[None, :] * down + other[:, None] * across, mask=known, other=0.0)


@triton.jit
def _settle(
    weight, error, keep, codes, factor, scale, zero, rows, down, across, levels,
    CHOOSE: tl.constexpr, MASKED: tl.constexpr, ROUND: tl.constexpr, N: tl.constexpr, SPAN: tl.constexpr,
    MEMBERS: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`rows` is also the stride of a column; `factor` is read at row * down + column * across."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    settled = tl.arange(0, PADDED)
    index = tl.arange(0, MEMBERS)
    member = index[:, None]
    lost = tl.zeros([PADDED, ROWS], dtype=tl.float32)  # e of the columns before the group, 0 for the others
    group = _entries(weight, 0, row, rows, inside, COLUMNS, SPAN, MEMBERS)  # the group as it is now
    coming = _entries(weight, SPAN, row, rows, inside, COLUMNS, SPAN, MEMBERS)  # the next one as it was
    shares = _shares(factor, SPAN, settled, down, across, COLUMNS, SPAN)
    for start in range(0, COLUMNS, SPAN):
        after = start + SPAN
        inner = _links(factor, start, start, down, across, COLUMNS, SPAN, MEMBERS)
        outer = _links(factor, start, after, down, across, COLUMNS, SPAN, MEMBERS)
        if MASKED and not CHOOSE:
            choice = _entries(keep, start, row, rows, inside, COLUMNS, SPAN, MEMBERS).to(tl.int32)
        if ROUND:
            steps = _entries(scale, start, row, rows, inside, COLUMNS, SPAN, MEMBERS)
            origins = _entries(zero, start, row, rows, inside, COLUMNS, SPAN, MEMBERS)
        # read a turn ahead, for nothing else hides the wait
        later = _entries(weight, after + SPAN, row, rows, inside, COLUMNS, SPAN, MEMBERS)
        later_shares = _shares(factor, after + SPAN, settled, down, across, COLUMNS, SPAN)
        for k in tl.static_range(SPAN):
            moved = tl.sum(lost * shares[k][:, None], axis=0)
            coming = tl.where(member == k, coming - moved[None, :], coming)
        pivots = tl.sum(tl.where(index[None, :] == member, inner, 0.0), axis=1)
        pivots = tl.where((index < SPAN) & (start + index < COLUMNS), pivots, 1.0)
        if CHOOSE:
            scores = tl.where(
                member < SPAN, tl.div_rn(tl.abs(group), tl.broadcast_to(pivots[:, None], group.shape)), -1.0
            )
            choice = _choice(scores, member, N, SPAN)
        for k in tl.static_range(SPAN):
            column = start + k
            there = inside & (column < COLUMNS)
            at = column * rows + row
            pivot = tl.sum(tl.where(index == k, pivots, 0.0), axis=0)
            own = _picked(group, member, k)
            kept = inside
            if CHOOSE or MASKED:
                kept = _picked(choice, member, k) != 0
            if CHOOSE:
                tl.store(keep + at, kept.to(tl.int8), mask=there)
            value = own
            if ROUND:
                origin = _picked(origins, member, k)
                step = tl.where(there, _picked(steps, member, k), 1.0)
                code = tl.where(kept, _code(own, step, origin, levels), origin)
                value = (code - origin) * step
                tl.store(codes + at, code, mask=there)
            value = tl.where(kept, value, 0.0)
            gone = tl.where(there, tl.div_rn(own - value, pivot), 0.0)
            tl.store(weight + at, value, mask=there)
            tl.store(error + at, gone, mask=there)
            lost = tl.where((settled == column)[:, None], gone[None, :], lost)
            group -= gone[None, :] * tl.sum(tl.where(index[None, :] == k, inner, 0.0), axis=1)[:, None]
            coming -= gone[None, :] * tl.sum(tl.where(index[None, :] == k, outer, 0.0), axis=1)[:, None]
        group, coming, shares = coming, later, later_shares


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
    span = pattern.m if pattern else SPAN
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
            SPAN=span,
            MEMBERS=triton.next_power_of_2(span),
            COLUMNS=columns,
            PADDED=triton.next_power_of_2(columns),
            ROWS=ROWS,
            num_warps=WARPS,
        )
