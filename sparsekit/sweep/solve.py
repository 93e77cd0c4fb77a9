"""One block of columns of a sweep: the part of `sparsekit.sweep.obs` that is sequential.

Tensors hold columns first, [columns, out], so that a column is contiguous and rows, which are
independent, lie along the last dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.pattern import Pattern
from sparsekit.quant import Grid

SUB_BLOCK = 16  # columns between two updates of the rest of a block; on CPU 8 to 64 differ by 5 % (solver_cpu.py)

AT_ONCE = 2**14  # pairs of entries that are all compared at once: a few calls in place of many


@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    """What `solve_block` found: q, e, the mask and the codes, each [columns, out]."""

    weight: Tensor
    error: Tensor
    keep: Tensor | None
    codes: Tensor | None


def solve_block(
    weight: Tensor, factor: Tensor, *, keep: Tensor | None, pattern: Pattern | None, grid: Grid | None
) -> Solved:
    """Sweep a few columns on their own, all that earlier columns moved onto them included.

    The sequential part of a sweep, and the place to dispatch to a fused kernel: rows (the last
    dimension) are independent, and nothing outside the block is read.

    Args:
        weight: [columns, out], each column contiguous. Not modified.
        factor: Diagonal block of U, [columns, columns]; what is below the diagonal is not read.
        keep: bool [columns, out], True = kept; None when all are, or when `pattern` chooses.
        pattern: N:M, with whole groups in the block: choose the mask.
        grid: Scale and zero-point of every entry, [columns, out]; None without rounding.
    """
    weight, error = weight.clone(), torch.empty_like(weight)
    step = pattern.m if pattern else 1
    drop = None if keep is None else ~keep
    if pattern:
        drop = torch.empty_like(weight, dtype=torch.bool)
    diagonal = factor.diagonal().unsqueeze(1)  # [columns, 1]
    moved = factor / diagonal  # U_ij / U_ii: what w_j takes of w_i - q_i
    columns, lost = weight.unbind(), error.unbind()
    dropped = None if drop is None else drop.unbind()
    grids = [] if grid is None else list(zip(grid.scale.unbind(), grid.zero.unbind(), strict=True))
    most = 0 if grid is None else 2**grid.bits - 1
    codes: list[Tensor] = []
    for start, stop in spans(0, len(weight), SUB_BLOCK, step, step):
        for i in range(start, stop):
            if pattern and drop is not None and i % step == 0:
                group = slice(i, i + step)
                drop[group] = ~best(weight[group].abs() / diagonal[group], pattern.n)
            value = columns[i]
            if grids:
                scale, zero = grids[i]
                codes.append(value.div(scale).add_(zero).round_().clamp_(0, most))  # as `Grid.encode`, in one's place
                value = codes[-1].sub(zero).mul_(scale)
            if dropped is not None:
                value = value.masked_fill(dropped[i], 0.0)
            torch.sub(columns[i], value, out=lost[i])
            columns[i].copy_(value)
            weight[i + 1 : stop].addcmul_(moved[i, i + 1 : stop, None], lost[i], value=-1)
        propagate(weight, moved, error, start, stop, len(weight))
    keep = None if drop is None else ~drop
    return Solved(weight, error / diagonal, keep, _codes(codes, grid, drop))


def _codes(columns: list[Tensor], grid: Grid | None, drop: Tensor | None) -> Tensor | None:
    """Codes of a block, those of pruned entries being the zero-point."""
    if grid is None:
        return None
    codes = torch.stack(columns)
    return codes if drop is None else torch.where(drop, grid.zero.to(codes.dtype), codes)


def best(score: Tensor, count: int) -> Tensor:
    """True at the `count` highest entries of each column; ties keep the lowest index.

    The choice of `Pattern.keep`, for a group that lies along the first dimension, and without
    looking at values from the host.

    Args:
        score: [m, out].
    """
    if len(score) * score.numel() > AT_ONCE:
        beaten_by = torch.zeros(score.shape, dtype=torch.int16, device=score.device)
        for i in range(len(score) - 1):
            wins = score[i + 1 :] > score[i]
            beaten_by[i] += wins.sum(0, dtype=torch.int16)
            beaten_by[i + 1 :] += ~wins
        return beaten_by < count
    wins = score.unsqueeze(0) > score.unsqueeze(1)  # the second over the first
    places = torch.arange(len(score), device=score.device)
    earlier = places.unsqueeze(1) > places  # `tril_` would wake every thread for it
    return torch.where(earlier.unsqueeze(-1), ~wins.transpose(0, 1), wins).sum(1) < count


def propagate(weight: Tensor, factor: Tensor, error: Tensor, first: int, last: int, end: int) -> None:
    """Move the errors of columns first..last onto columns last..end, in place."""
    if last < end:
        weight[last:end].addmm_(factor[first:last, last:end].t(), error[first:last], alpha=-1)


def spans(start: int, end: int, size: int, unit: int, step: int) -> Iterator[tuple[int, int]]:
    """Cut columns into spans of at most `size` (or `step`), each of whole units or within one unit."""
    while start < end:
        if unit <= size:
            stop = start + size // unit * unit
        else:
            stop = min(start + max(size // step, 1) * step, (start // unit + 1) * unit)
        yield start, min(stop, end)
        start = stop
