"""A column sweep under way: the state of `sparsekit.sweep.obs.sweep`, block by block.

How errors reach the columns to come depends on what is known of the Gram matrix H. With U, the upper
factor of its inverse, the errors e of a block move on at once: w_j -= e_i U_ij. With the upper root G,
H = G Gᵀ, no inverse is needed: the settled columns are remembered as c = (w - q) G, and what they want
of a block is one product with the inverse of its own 128 columns, w_b + c_b G_bb⁻¹. Inside a block both
are the same, for G_bb⁻¹ is the block of U. The results agree up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsekit.kernels.oneshot import WIDEST, Settle
from sparsekit.pattern import Pattern
from sparsekit.quant import Grid, Rounding
from sparsekit.sweep.root import Root
from sparsekit.sweep.solve import propagate, solve_block, spans


@dataclass(slots=True, eq=False)
class Work:
    """Columns come first and in sweep order, [in, out], so that each is contiguous.

    Attributes:
        weight: q in settled columns, w in the others, brought up to date block by block.
        factor: U [in, in], or the root G.
        error: e of the settled columns.
        keep: Mask; None when nothing is pruned.
        codes: Integers; None without rounding.
        grid: Scale and zero-point of every entry.
        settle: The kernel, where it runs.
        first: First column of the current block.
        local: U of the current block, [columns, columns].
    """

    weight: Tensor
    factor: Tensor | Root
    error: Tensor
    keep: Tensor | None
    codes: Tensor | None
    grid: Grid | None
    settle: Settle | None = None
    first: int = 0
    local: Tensor = field(default_factory=lambda: torch.empty(0))
    _moved: Tensor = field(default_factory=lambda: torch.empty(0))  # c of the root
    _given: Tensor = field(default_factory=lambda: torch.empty(0))  # w before the sweep
    _inverses: dict[int, Tensor] = field(default_factory=dict)  # by first column

    @property
    def columns(self) -> int:
        """How many columns are swept."""
        return len(self.weight)

    def cut(self, blocks: Sequence[tuple[int, int]]) -> None:
        """Prepare for a sweep in these blocks."""
        if isinstance(self.factor, Root):
            self._given, self._moved = self.weight.clone(), torch.zeros_like(self.weight)
            self._inverses = self.factor.inverses(blocks)
        elif self.settle is not None:
            self.factor = self.factor.t().contiguous().t()  # the kernel reads it by columns

    def enter(self, start: int, stop: int) -> None:
        """Bring a block up to date."""
        self.first = start
        if isinstance(self.factor, Root):
            self.local = self._inverses[start]
            if start:
                self.weight[start:stop].addmm_(self.local.t(), self._moved[start:stop])
        else:
            self.local = self.factor[start:stop, start:stop]

    def leave(self, start: int, stop: int) -> None:
        """Move the errors of a settled block onto all columns to come."""
        if not isinstance(self.factor, Root):
            propagate(self.weight, self.factor, self.error, start, stop, self.columns)
        elif stop < self.columns:
            change = self._given[start:stop] - self.weight[start:stop]
            for first, values in self.factor.right_of(start, stop):
                self._moved[first : first + values.shape[1]].addmm_(values.t(), change)

    def choose(self, pattern: Pattern, start: int, stop: int) -> None:
        """Choose the unstructured mask of a block; the counts of all blocks add up to the exact one."""
        assert self.keep is not None  # there is a pattern
        score = (self.weight[start:stop] / self.local.diagonal().unsqueeze(1)).abs()
        before, upto = (math.floor(pattern.sparsity * (self.weight.shape[1] * column)) for column in (start, stop))
        share = (upto - before + 0.5) / score.numel()  # + 0.5: the floor in `keep` gives the count back
        self.keep[start:stop] = Pattern.unstructured(min(share, 1.0)).keep(score.t(), per="layer").t()

    def fit(self, rounding: Rounding, first: int, last: int) -> None:
        """Fit the grid of a group on the weights as they are now, without what is known to be pruned."""
        assert self.grid is not None  # there is a rounding
        keep = None if self.keep is None else self.keep[first:last]
        fitted = rounding.fit(kept(self.weight[first:last], keep).t())
        self.grid.scale[first:last] = fitted.scale
        self.grid.zero[first:last] = fitted.zero

    def solve(self, first: int, last: int, pattern: Pattern | None) -> None:
        """Settle columns that are up to date and whose grids are known, and repair the rest of the block."""
        if self.settle is not None:
            self._solve_fused(self.settle, first, last, pattern)
            return
        here = slice(first, last)
        solved = solve_block(
            self.weight[here],
            self._inner(first, last),
            keep=None if self.keep is None or pattern else self.keep[here],
            pattern=pattern,
            grid=None if self.grid is None else Grid(self.grid.scale[here], self.grid.zero[here], self.grid.bits),
        )
        self.weight[here], self.error[here] = solved.weight, solved.error
        if self.keep is not None and solved.keep is not None:
            self.keep[here] = solved.keep
        if self.codes is not None and solved.codes is not None:
            self.codes[here] = solved.codes
        self._repair(first, last)

    def _inner(self, first: int, last: int) -> Tensor:
        """U of some columns of the current block."""
        here = slice(first - self.first, last - self.first)
        return self.local[here, here]

    def _repair(self, first: int, last: int) -> None:
        """Move the errors of some columns of the current block onto its others."""
        block = slice(self.first, self.first + len(self.local))
        propagate(
            self.weight[block], self.local, self.error[block], first - self.first, last - self.first, len(self.local)
        )

    def _solve_fused(self, settle: Settle, first: int, last: int, pattern: Pattern | None) -> None:
        """`solve` in place, as many columns a launch as the kernel takes."""
        step = pattern.m if pattern else 1
        for start, stop in spans(first, last, WIDEST, step, step):
            here = slice(start, stop)
            settle(
                self.weight[here],
                self.error[here],
                self._inner(start, stop),
                keep=None if self.keep is None else self.keep[here],
                codes=None if self.codes is None else self.codes[here],
                pattern=pattern,
                grid=None if self.grid is None else Grid(self.grid.scale[here], self.grid.zero[here], self.grid.bits),
            )
            self._repair(start, stop)


def kept(weight: Tensor, keep: Tensor | None) -> Tensor:
    """The weight without its pruned entries."""
    return weight if keep is None else weight.masked_fill(~keep, 0.0)
