"""The root of a Gram matrix in half the memory: what is above the diagonal, cut into panels of columns.

Panel k holds rows 0..(k+1)·w of columns k·w..(k+1)·w. From the last panel to the first, each loses what the panels
after it stand for, its own square is factored, and what lies above the square is divided by it. So there are never
more than 4 bytes an entry of the matrix besides the sum, in float64, where `root_in_place` takes 12; the products
are as large as a library's own, and the results differ by the rounding of float64 only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekit.sweep.root import Root, climbed, indefinite, refuse, reordered

WIDTH = 768  # columns of a panel: large enough for products, little beside the whole


def root_in_panels(
    total: Tensor, tokens: int, ladder: Sequence[int], damp: float, order: Tensor | None, width: int = WIDTH
) -> tuple[Root, float]:
    """Upper root of a damped Gram matrix in panels of `width` columns, and the damping that was needed.

    Arguments and errors as in `root_in_place`; the panels are float32.
    """
    refuse(total, tokens)
    level = (total.diagonal() / tokens).double()
    mean = level.mean()
    level = level.masked_fill(total.diagonal() == 0, 1.0)
    level = level if order is None else level[order]
    for used in climbed(ladder, damp):
        panels = [
            _panel(total, tokens, level + used * mean, start, min(start + width, len(total)), order)
            for start in range(0, len(total), width)
        ]
        if _factored(panels):
            for index, panel in enumerate(panels):  # one at a time, each gives its memory back
                panels[index] = panel.float()
            return Root(*panels), used
    raise indefinite(used)


def _panel(total: Tensor, tokens: int, level: Tensor, start: int, stop: int, order: Tensor | None) -> Tensor:
    """Rows 0..stop of columns start..stop of the mean matrix, with another diagonal, float64 [stop, stop - start]."""
    if order is None:
        found = total[:stop, start:stop] / tokens
    else:
        found = reordered(total, order[:stop], order[start:stop]).div_(tokens)
    panel = found.double()
    panel[start:].diagonal().copy_(level[start:stop])
    return panel


def _factored(panels: Sequence[Tensor]) -> bool:
    """Turn the panels of a matrix into those of its upper root, in place; False if it is not positive definite."""
    broken = torch.zeros((), dtype=torch.bool, device=panels[0].device)
    for number in reversed(range(len(panels))):
        own = panels[number]
        stop = len(own)
        start = stop - own.shape[1]
        for later in panels[number + 1 :]:
            own.addmm_(later[:stop], later[start:stop].t(), alpha=-1)
        square = own[start:]
        whole = square.triu() + square.triu(1).t()
        lower, failed = torch.linalg.cholesky_ex(whole.flip(0, 1))
        broken |= failed != 0
        square.copy_(lower.flip(0, 1))
        if start:
            own[:start] = torch.linalg.solve_triangular(square.t(), own[:start], upper=False, left=False)
    return not bool(broken)
