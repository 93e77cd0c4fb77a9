"""The column sweep of the optimal brain surgeon, shared by SparseGPT and GPTQ.

Every row w of a weight is a least-squares problem of its own: find q, zero where it is pruned and
on a grid where it is quantized, with little loss (w - q) H (w - q)ᵀ; H is the damped Gram matrix
of the inputs. The sweep settles one column after another and moves the error onto the columns
that are still free. With U upper triangular and H⁻¹ = UᵀU:

    e_i = (w_i - q_i) / U_ii        w_j -= e_i U_ij  for j > i

In the end w - q = e U, so the loss of a row is |e|². The methods differ in q_i only: SparseGPT
chooses a mask on the way (`pattern`), GPTQ puts w_i on an integer grid (`rounding`), and after a
pruner q_i is 0 where a frozen `mask` says so. Pruning and rounding combine freely.

Columns are settled in blocks, so that almost all arithmetic is in matrix products. The blocks do
not change the result, except for an unstructured pattern, whose mask is chosen block by block.

Source: Frantar & Alistarh 2023 (SparseGPT), arXiv:2301.00774, Alg. 1; Frantar et al. 2022 (GPTQ),
arXiv:2210.17323, Alg. 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsekit.errors import MethodError, NumericsError
from sparsekit.kernels import Kernels
from sparsekit.kernels.oneshot import WIDEST, Settle, settle_kernel
from sparsekit.ladder import damping_note, dead_note
from sparsekit.pattern import Pattern
from sparsekit.quant import Grid
from sparsekit.solve import propagate, solve_block, spans
from sparsekit.state import LinearState
from sparsekit.stats import Gram

BLOCK = 128  # columns between two updates of all columns to come: both papers' value


def prepared(layer: LinearState, gram: Gram, damp: float, order: Tensor | None) -> tuple[LinearState, Tensor]:
    """The layer with the weights of dead inputs zeroed, and its factor U, rows and columns in `order`.

    Dead inputs, and a damping that had to be raised, are noted on the layer.

    Raises:
        NumericsError: Weights or activations are not finite, or no damping of the ladder helps.
    """
    if not torch.isfinite(layer.source).all():
        raise NumericsError("weights are not finite (inf or NaN)", layer=layer.name)
    factor, used = gram.inverse_factor(damp, order)
    if used > damp:
        layer = layer.noted(damping_note(damp, used))
    if dead := int(gram.dead.sum()):
        layer = layer.noted(dead_note(dead, len(gram.dead)))
    return replace(layer, source=layer.source.masked_fill(gram.dead, 0.0)), factor


@dataclass(frozen=True, slots=True)
class Rounding:
    """How kept weights are put on integer grids.

    Attributes:
        bits: Bits of a code.
        group_size: Columns that share a grid; must divide the row.
        symmetric: See `Grid.fit`.
        mse: See `Grid.fit`.
        static: Fit every grid before the sweep, on the given weights and groups in natural order.
            Otherwise a grid is fitted when the sweep reaches its group, on the weights as they are
            then, and groups are runs of columns in sweep order.
    """

    bits: int
    group_size: int
    symmetric: bool = True
    mse: bool = False
    static: bool = False

    def fit(self, weight: Tensor) -> Grid:
        """One grid for each leading index of a weight [..., group]."""
        return Grid.fit(weight, self.bits, symmetric=self.symmetric, mse=self.mse)


@dataclass(frozen=True, slots=True, eq=False)
class Swept:
    """What a sweep found, columns in natural order.

    Attributes:
        weight: [out, in]; pruned entries are +0.0.
        keep: bool [out, in], True = kept; None when nothing was to be pruned.
        codes: Integers as floats, [out, in]; None without rounding.
        grid: Scales and zero-points, [out, groups]; None without rounding.
        group_of: int64 [in], the group of each column; None without rounding.
        loss: 0-dim, the sum of e² = tr((W - Q) H (W - Q)ᵀ).
    """

    weight: Tensor
    keep: Tensor | None
    codes: Tensor | None
    grid: Grid | None
    group_of: Tensor | None
    loss: Tensor


def sweep(
    weight: Tensor,
    factor: Tensor,
    *,
    order: Tensor | None = None,
    pattern: Pattern | None = None,
    mask: Tensor | None = None,
    rounding: Rounding | None = None,
    block: int = BLOCK,
    kernels: Kernels = "auto",
) -> Swept:
    """Prune, quantize or both, column by column, repairing with the columns to come.

    Args:
        weight: [out, in], float32. Not modified.
        factor: U of the damped Gram matrix, [in, in], rows and columns in sweep order.
        order: Permutation of the columns, int64 [in]: the sweep takes order[0] first. Under an N:M
            pattern it must move whole groups of M. None is the natural order.
        pattern: Choose the mask on the way. N:M: group by group, on the weights as they are when
            the sweep gets there. Unstructured: block by block, over all rows.
        mask: A frozen mask instead of a pattern, bool [out, in].
        rounding: Put kept weights on grids.
        block: Columns of a block; adapted to whole groups.
        kernels: Whether a Triton kernel settles the columns of a block.

    Raises:
        MethodError: The groups of the pattern or the rounding do not fit, or Triton is insisted on
            and cannot run.
    """
    _check(weight.shape[1], pattern, mask, rounding)
    nm = pattern if pattern and pattern.structured else None
    live = rounding if rounding and not rounding.static else None  # grids are fitted on the way
    work = _begin(weight, factor, order, pattern, mask, rounding)
    if settle := settle_kernel(kernels, work.weight, nm):
        work.settle, work.factor = settle, work.factor.t().contiguous().t()  # the kernel reads it by columns
    step = nm.m if nm else 1
    for start, stop in spans(0, work.columns, block, live.group_size if live else step, step):
        if pattern and not nm:
            work.choose(pattern, start, stop)
        for first, last in spans(start, stop, min(live.group_size, block) if live else block, step, step):
            if live and first % live.group_size == 0:
                work.fit(live, first, first + live.group_size)
            work.solve(first, last, nm)
            propagate(work.weight, work.factor, work.error, first, last, stop)
        propagate(work.weight, work.factor, work.error, start, stop, work.columns)
    return work.finish(order, rounding)


def _check(columns: int, pattern: Pattern | None, mask: Tensor | None, rounding: Rounding | None) -> None:
    if pattern is not None and mask is not None:
        raise MethodError("a sweep takes a pattern or a mask, not both")
    if pattern is not None and not pattern.fits(columns):
        raise MethodError(f"{columns} inputs do not divide into groups of {pattern.m} (pattern {pattern})")
    if pattern is not None and pattern.structured and rounding is not None and rounding.group_size % pattern.m:
        raise MethodError(f"group_size {rounding.group_size} is no multiple of {pattern.m} (pattern {pattern})")


@dataclass(slots=True, eq=False)
class _Work:
    """A sweep under way. Columns come first and in sweep order, [in, out], so that each is contiguous.

    Attributes:
        weight: q in settled columns, w in the others, brought up to date block by block.
        grid: Scale and zero-point of every entry, [in, out].
        settle: The kernel, where it runs.
    """

    weight: Tensor
    factor: Tensor
    error: Tensor
    keep: Tensor | None
    codes: Tensor | None
    grid: Grid | None
    settle: Settle | None = None

    @property
    def columns(self) -> int:
        return len(self.weight)

    def choose(self, pattern: Pattern, start: int, stop: int) -> None:
        """Choose the unstructured mask of a block; the counts of all blocks add up to the exact one."""
        assert self.keep is not None  # there is a pattern
        score = (self.weight[start:stop] / self.factor.diagonal()[start:stop].unsqueeze(1)).abs()
        before, upto = (math.floor(pattern.sparsity * (self.weight.shape[1] * column)) for column in (start, stop))
        share = (upto - before + 0.5) / score.numel()  # + 0.5: the floor in `keep` gives the count back
        self.keep[start:stop] = Pattern.unstructured(min(share, 1.0)).keep(score.t(), per="layer").t()

    def fit(self, rounding: Rounding, first: int, last: int) -> None:
        """Fit the grid of a group on the weights as they are now, without what is known to be pruned."""
        assert self.grid is not None  # there is a rounding
        keep = None if self.keep is None else self.keep[first:last]
        fitted = rounding.fit(_kept(self.weight[first:last], keep).t())
        self.grid.scale[first:last] = fitted.scale
        self.grid.zero[first:last] = fitted.zero

    def solve(self, first: int, last: int, pattern: Pattern | None) -> None:
        """Settle columns that are up to date and whose grids are known."""
        if self.settle is not None:
            self._solve_fused(self.settle, first, last, pattern)
            return
        here = slice(first, last)
        solved = solve_block(
            self.weight[here],
            self.factor[here, here],
            keep=None if self.keep is None or pattern else self.keep[here],
            pattern=pattern,
            grid=None if self.grid is None else Grid(self.grid.scale[here], self.grid.zero[here], self.grid.bits),
        )
        self.weight[here], self.error[here] = solved.weight, solved.error
        if self.keep is not None and solved.keep is not None:
            self.keep[here] = solved.keep
        if self.codes is not None and solved.codes is not None:
            self.codes[here] = solved.codes

    def _solve_fused(self, settle: Settle, first: int, last: int, pattern: Pattern | None) -> None:
        """`solve` in place, as many columns a launch as the kernel takes."""
        step = pattern.m if pattern else 1
        for start, stop in spans(first, last, WIDEST, step, step):
            here = slice(start, stop)
            settle(
                self.weight[here],
                self.error[here],
                self.factor[here, here],
                keep=None if self.keep is None else self.keep[here],
                codes=None if self.codes is None else self.codes[here],
                pattern=pattern,
                grid=None if self.grid is None else Grid(self.grid.scale[here], self.grid.zero[here], self.grid.bits),
            )
            propagate(self.weight, self.factor, self.error, start, stop, last)

    def finish(self, order: Tensor | None, rounding: Rounding | None) -> Swept:
        """Put the columns back into natural order."""
        columns = torch.arange(self.columns, device=self.weight.device)
        place = columns if order is None else torch.argsort(order)  # of each natural column in the sweep

        def natural(tensor: Tensor) -> Tensor:
            return tensor[place].t().contiguous()

        grid, group_of = None, None
        if self.grid is not None and rounding is not None:
            group_of = (columns if rounding.static else place) // rounding.group_size
            first = (place if rounding.static else columns)[:: rounding.group_size]  # a column of each group
            grid = Grid(self.grid.scale[first].t(), self.grid.zero[first].t(), rounding.bits)
        return Swept(
            weight=natural(self.weight),
            keep=None if self.keep is None else natural(self.keep),
            codes=None if self.codes is None else natural(self.codes),
            grid=grid,
            group_of=group_of,
            loss=self.error.square().sum(),
        )


def _begin(
    weight: Tensor,
    factor: Tensor,
    order: Tensor | None,
    pattern: Pattern | None,
    mask: Tensor | None,
    rounding: Rounding | None,
) -> _Work:
    """Turn everything into sweep order."""
    columns = torch.arange(weight.shape[1], device=weight.device)

    def turned(tensor: Tensor) -> Tensor:
        return tensor.t().index_select(0, columns if order is None else order)

    keep = None if mask is None else turned(mask)
    if pattern is not None:
        keep = torch.ones(weight.t().shape, dtype=torch.bool, device=weight.device)
    grid = None
    if rounding is not None and rounding.static:
        size = rounding.group_size
        fitted = rounding.fit(_kept(weight, mask).reshape(len(weight), -1, size))  # [out, groups]
        scale, zero = (turned(each.repeat_interleave(size, dim=1)) for each in (fitted.scale, fitted.zero))
        grid = Grid(scale, zero, rounding.bits)
    elif rounding is not None:
        blank = torch.ones(weight.t().shape, device=weight.device)
        grid = Grid(blank, blank.clone(), rounding.bits)
    own = turned(weight)
    codes = None if rounding is None else torch.empty_like(own)
    return _Work(own, factor.to(weight.dtype), torch.empty_like(own), keep, codes, grid)


def _kept(weight: Tensor, keep: Tensor | None) -> Tensor:
    return weight if keep is None else weight.masked_fill(~keep, 0.0)
