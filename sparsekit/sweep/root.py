"""The root of a Gram matrix, and the inverses of its blocks that a column sweep needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekit.errors import NumericsError


class Root:
    """The upper root G of a damped Gram matrix, H = G Gᵀ.

    Attributes:
        matrix: G, float32 [in, in].
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self._inverses: dict[tuple[tuple[int, int], ...], dict[int, Tensor]] = {}

    def to(self, dtype: torch.dtype) -> Root:
        """In another dtype."""
        return self if self.matrix.dtype == dtype else Root(self.matrix.to(dtype))

    def inverses(self, blocks: Sequence[tuple[int, int]]) -> dict[int, Tensor]:
        """Inverses of some diagonal blocks by first column, contiguous by columns; those of one size in one call."""
        key = tuple(blocks)
        if key not in self._inverses:
            found: dict[int, Tensor] = {}
            for size in {stop - start for start, stop in blocks}:
                starts = [start for start, stop in blocks if stop - start == size]
                stack = torch.stack([self.matrix[at : at + size, at : at + size] for at in starts]).double()
                eye = torch.eye(size, dtype=stack.dtype, device=stack.device).expand_as(stack)
                inverse = torch.linalg.solve_triangular(stack, eye, upper=True).to(self.matrix.dtype)
                found |= zip(starts, inverse.mT.contiguous().mT, strict=True)
            self._inverses[key] = found
        return self._inverses[key]


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
    if tokens == 0:
        raise NumericsError("no calibration token reached this layer")
    if not torch.isfinite(total.diagonal()).all():  # |H_ij|² is at most H_ii H_jj
        raise NumericsError("calibration activations are not finite (inf or NaN in the Gram matrix)")
    work = torch.empty(total.shape, dtype=torch.float64, device=total.device)
    failed = torch.empty((), dtype=torch.int32, device=total.device)
    for rung in ladder:
        used = damp if rung == 1 else max(damp, 1e-4) * rung  # an undamped singular matrix needs a rung to climb
        _reversed_into(work, total, tokens, used, order)
        # LAPACK counts by columns: the upper factor of the transposed view lies in `work` as the lower one
        factor = work.mT
        torch.linalg.cholesky_ex(factor, upper=True, out=(factor, failed))
        if int(failed) == 0:
            narrow = work.float()
            del work, factor
            return narrow.flip(0, 1), float(used)
    raise NumericsError(f"the Gram matrix is not positive definite even with damping {used:g}")


def _reversed_into(work: Tensor, total: Tensor, tokens: int, damp: float, order: Tensor | None) -> None:
    """The damped matrix with its inputs from the last in `order` to the first, float64."""
    dead = total.diagonal() == 0
    if order is None:
        turned = total.flip(0, 1)
    else:
        back = order.flip(0)
        turned, dead = total[back.unsqueeze(1), back], dead[order]
    work.copy_(turned.div_(tokens))
    level = work.diagonal()
    mean = level.mean()
    level.masked_fill_(dead.flip(0), 1.0)
    level += damp * mean
