"""The root of a Gram matrix, and the inverses of its blocks that a column sweep needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sparsekit.errors import NumericsError

ROWS = 512  # of a matrix that are reordered at a time


class Root:
    """The upper root G of a damped Gram matrix, H = G Gᵀ.

    Args:
        panels: G as panels of neighbouring columns, from left to right, float32; each ends with the last row
            that is not zero, or later. One panel is the whole.
    """

    def __init__(self, *panels: Tensor) -> None:
        self._panels = panels
        self._inverses: dict[tuple[tuple[int, int], ...], dict[int, Tensor]] = {}

    @property
    def matrix(self) -> Tensor:
        """G, [in, in]."""
        return self._square(0, sum(panel.shape[1] for panel in self._panels))

    def to(self, dtype: torch.dtype) -> Root:
        """In another dtype."""
        return self if self._panels[0].dtype == dtype else Root(*(panel.to(dtype) for panel in self._panels))

    def right_of(self, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """What rows start..stop hold right of column `stop`, in parts: the first column of each, and its values."""
        for first, panel in self._placed():
            skipped = max(stop - first, 0)
            if skipped < panel.shape[1]:
                yield first + skipped, panel[start:stop, skipped:]

    def inverses(self, blocks: Sequence[tuple[int, int]]) -> dict[int, Tensor]:
        """Inverses of some diagonal blocks by first column, contiguous by columns; those of one size in one call."""
        key = tuple(blocks)
        if key not in self._inverses:
            found: dict[int, Tensor] = {}
            for size in {stop - start for start, stop in blocks}:
                starts = [start for start, stop in blocks if stop - start == size]
                stack = torch.stack([self._square(at, size) for at in starts]).double()
                eye = torch.eye(size, dtype=stack.dtype, device=stack.device).expand_as(stack)
                inverse = torch.linalg.solve_triangular(stack, eye, upper=True).to(self._panels[0].dtype)
                found |= zip(starts, inverse.mT.contiguous().mT, strict=True)
            self._inverses[key] = found
        return self._inverses[key]

    def _placed(self) -> Iterator[tuple[int, Tensor]]:
        """Every panel with its first column."""
        first = 0
        for panel in self._panels:
            yield first, panel
            first += panel.shape[1]

    def _square(self, at: int, size: int) -> Tensor:
        """The square on the diagonal whose first column is `at`."""
        if len(self._panels) == 1:
            return self._panels[0][at : at + size, at : at + size]
        found = self._panels[0].new_zeros(size, size)
        for first, panel in self._placed():
            start, stop = max(at, first), min(at + size, first + panel.shape[1])
            if start < stop:
                rows = panel[at : at + size, start - first : stop - first]
                found[: len(rows), start - at : stop - at] = rows
        return found


def root_in_place(
    total: Tensor, tokens: int, ladder: Sequence[int], damp: float, order: Tensor | None
) -> tuple[Tensor, float]:
    """Upper root of a damped Gram matrix with one matrix in float64, which the factor overwrites.

    Args:
        total: Σ x xᵀ, float32 [in, in]. Not modified.
        tokens: How many it is of.
        ladder: Multiples of the asked damping that may be used, in this order.
        damp: Ridge as a fraction of the mean diagonal.
        order: A permutation of the inputs, int64 [in].
    Returns:
        The root, float32 [in, in], and the damping that was needed.
    Raises:
        NumericsError: Activations are not finite, or no rung of the ladder factors.
    """
    refuse(total, tokens)
    work = torch.empty(total.shape, dtype=torch.float64, device=total.device)
    failed = torch.empty((), dtype=torch.int32, device=total.device)
    for used in climbed(ladder, damp):
        _reversed_into(work, total, tokens, used, order)
        # LAPACK counts by columns: the upper factor of the transposed view lies in `work` as the lower one
        factor = work.mT
        torch.linalg.cholesky_ex(factor, upper=True, out=(factor, failed))
        if int(failed) == 0:
            narrow = work.float()
            del work, factor
            return narrow.flip(0, 1), used
    raise indefinite(used)


def reversed_factor(
    total: Tensor, tokens: int, ladder: Sequence[int], damp: float, order: Tensor | None
) -> tuple[Tensor, float]:
    """Lower Cholesky factor of the damped matrix with rows and columns reversed, float64, and the damping.

    Arguments and errors as in `root_in_place`.
    """
    if tokens == 0:
        raise NumericsError("no calibration token reached this layer")
    if not torch.isfinite(total).all():
        raise NumericsError("calibration activations are not finite (inf or NaN in the Gram matrix)")
    matrix = (total / tokens).double()
    mean = matrix.diagonal().mean()
    matrix.diagonal()[total.diagonal() == 0] = 1.0
    if order is not None:
        matrix = matrix[order][:, order]
    matrix = matrix.flip(0, 1)
    level = matrix.diagonal().clone()
    for used in climbed(ladder, damp):
        matrix.diagonal().copy_(level + used * mean)
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if int(failed) == 0:
            return lower, used
    raise indefinite(used)


def climbed(ladder: Sequence[int], damp: float) -> Iterator[float]:
    """The dampings to try, in order: multiples of the asked one, or of a little where that is nothing."""
    for rung in ladder:  # an undamped singular matrix needs a rung to climb
        yield float(damp if rung == 1 else max(damp, 1e-4) * rung)


def indefinite(damp: float) -> NumericsError:
    """What ends a ladder of which no damping was enough; this was the last."""
    return NumericsError(f"the Gram matrix is not positive definite even with damping {damp:g}")


def refuse(total: Tensor, tokens: int) -> None:
    """Refuse a sum of no tokens, or one that is not finite."""
    if tokens == 0:
        raise NumericsError("no calibration token reached this layer")
    if not torch.isfinite(total.diagonal()).all():  # |H_ij|² is at most H_ii H_jj
        raise NumericsError("calibration activations are not finite (inf or NaN in the Gram matrix)")


def _reversed_into(work: Tensor, total: Tensor, tokens: int, damp: float, order: Tensor | None) -> None:
    """The damped matrix with its inputs from the last in `order` to the first, float64, some rows at a time."""
    back = torch.arange(len(total), device=total.device).flip(0) if order is None else order.flip(0)
    for start in range(0, len(total), ROWS):
        rows = back[start : start + ROWS]
        work[start : start + ROWS] = reordered(total, rows, back).div_(tokens)
    level = work.diagonal()
    mean = level.mean()
    level.masked_fill_((total.diagonal() == 0)[back], 1.0)
    level += damp * mean


def reordered(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Some rows of some columns of a matrix, by their numbers.

    Indexing with both at once would write out both numbers of every entry on CUDA, 16 bytes each.
    """
    if len(rows) < len(columns):
        return matrix.index_select(0, rows).index_select(1, columns)
    return matrix.index_select(1, columns).index_select(0, rows)
