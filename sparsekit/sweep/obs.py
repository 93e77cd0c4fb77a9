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

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsekit.errors import MethodError, NumericsError
from sparsekit.kernels import Kernels
from sparsekit.kernels.oneshot import settle_kernel
from sparsekit.ladder import damping_note, dead_note
from sparsekit.pattern import Pattern
from sparsekit.quant import Grid, Rounding
from sparsekit.state import LinearState
from sparsekit.stats import Gram
from sparsekit.sweep.root import Root
from sparsekit.sweep.solve import spans
from sparsekit.sweep.work import Work, kept

BLOCK = 128  # columns between two updates of all columns to come: both papers' value


def prepared(
    layer: LinearState, gram: Gram, damp: float, order: Tensor | None, *, inverse: bool = False
) -> tuple[LinearState, Tensor | Root]:
    """The layer with the weights of dead inputs zeroed, and its factor, rows and columns in `order`.

    The factor is the root, or U, which costs four times as much, if the `inverse` is asked for. Dead inputs,
    and a damping that had to be raised, are noted on the layer.

    Raises:
        NumericsError: Weights or activations are not finite, or no damping of the ladder helps.
    """
    if not torch.isfinite(layer.source).all():
        raise NumericsError("weights are not finite (inf or NaN)", layer=layer.name)
    factor, used = gram.inverse_factor(damp, order) if inverse else gram.root(damp, order)
    if used > damp:
        layer = layer.noted(damping_note(damp, used))
    if dead := int(gram.dead.sum()):
        layer = layer.noted(dead_note(dead, len(gram.dead)))
    return replace(layer, source=layer.source.masked_fill(gram.dead, 0.0)), factor


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
    factor: Tensor | Root,
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
        factor: U of the damped Gram matrix, [in, in], or its root, rows and columns in sweep order.
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
    if live and isinstance(factor, Root) and block < live.group_size < weight.shape[1]:
        raise MethodError(f"groups of {live.group_size} are longer than a block and need U, not the root")
    work = _begin(weight, factor, order, pattern, mask, rounding)
    work.settle = settle_kernel(kernels, work.weight, nm)
    step = nm.m if nm else 1
    blocks = list(spans(0, work.columns, block, live.group_size if live else step, step))
    work.cut(blocks)
    for start, stop in blocks:
        work.enter(start, stop)
        if pattern and not nm:
            work.choose(pattern, start, stop)
        for first, last in spans(start, stop, min(live.group_size, block) if live else block, step, step):
            if live and first % live.group_size == 0:
                work.fit(live, first, first + live.group_size)
            work.solve(first, last, nm)
        work.leave(start, stop)
    return _finish(work, order, rounding)


def _check(columns: int, pattern: Pattern | None, mask: Tensor | None, rounding: Rounding | None) -> None:
    if pattern is not None and mask is not None:
        raise MethodError("a sweep takes a pattern or a mask, not both")
    if pattern is not None and not pattern.fits(columns):
        raise MethodError(f"{columns} inputs do not divide into groups of {pattern.m} (pattern {pattern})")
    if pattern is not None and pattern.structured and rounding is not None and rounding.group_size % pattern.m:
        raise MethodError(f"group_size {rounding.group_size} is no multiple of {pattern.m} (pattern {pattern})")


def _begin(
    weight: Tensor,
    factor: Tensor | Root,
    order: Tensor | None,
    pattern: Pattern | None,
    mask: Tensor | None,
    rounding: Rounding | None,
) -> Work:
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
        fitted = rounding.fit(kept(weight, mask).reshape(len(weight), -1, size))  # [out, groups]
        scale, zero = (turned(each.repeat_interleave(size, dim=1)) for each in (fitted.scale, fitted.zero))
        grid = Grid(scale, zero, rounding.bits)
    elif rounding is not None:
        blank = torch.ones(weight.t().shape, device=weight.device)
        grid = Grid(blank, blank.clone(), rounding.bits)
    own = turned(weight)
    codes = None if rounding is None else torch.empty_like(own)
    return Work(own, factor.to(weight.dtype), torch.empty_like(own), keep, codes, grid)


def _finish(work: Work, order: Tensor | None, rounding: Rounding | None) -> Swept:
    """Put the columns back into natural order."""
    columns = torch.arange(work.columns, device=work.weight.device)
    place = columns if order is None else torch.argsort(order)  # of each natural column in the sweep

    def natural(tensor: Tensor) -> Tensor:
        return tensor[place].t().contiguous()

    grid, group_of = None, None
    if work.grid is not None and rounding is not None:
        group_of = (columns if rounding.static else place) // rounding.group_size
        first = (place if rounding.static else columns)[:: rounding.group_size]  # a column of each group
        grid = Grid(work.grid.scale[first].t(), work.grid.zero[first].t(), rounding.bits)
    return Swept(
        weight=natural(work.weight),
        keep=None if work.keep is None else natural(work.keep),
        codes=None if work.codes is None else natural(work.codes),
        grid=grid,
        group_of=group_of,
        loss=work.error.square().sum(),
    )
