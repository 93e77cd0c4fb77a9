"""Which implementation of the one-shot methods' inner operations runs: plain torch, or a Triton kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sparsekit.kernels import FLOATS, Kernels, runs_triton

if TYPE_CHECKING:
    from sparsekit.pattern import Pattern
    from sparsekit.quant import Grid, Levels

WIDEST = 128  # columns that the sweep's kernel settles at a time
TURN = 8  # columns of its longest turn, and so M of a pattern: with 16 it spills, and compiles for 20 s
WIDE = 2048  # inputs from which on the triangle of a Gram matrix has enough tiles for a device
LONGEST = 32  # groups of M that the mask kernel takes


class Settle(Protocol):
    """`kernels.settle.settle_`."""

    def __call__(
        self,
        weight: Tensor,
        error: Tensor,
        factor: Tensor,
        *,
        keep: Tensor | None,
        codes: Tensor | None,
        pattern: Pattern | None,
        grid: Grid | None,
    ) -> None:
        """Settle a block of columns in place."""


class Fit(Protocol):
    """`kernels.grids.fit`."""

    def __call__(self, weight: Tensor, bits: int, symmetric: bool, mse: bool, levels: Levels) -> tuple[Tensor, Tensor]:
        """Scale and zero-point of each leading index."""
        ...


class Mask(Protocol):
    """`kernels.masks.nm_mask`."""

    def __call__(
        self, score: Tensor, norm: Tensor | None, pattern: Pattern, *, absolute: bool
    ) -> tuple[Tensor, Tensor]:
        """A mask, and whether a score was NaN."""
        ...


class AddUpper(Protocol):
    """`kernels.products.add_upper`."""

    def __call__(self, x: Tensor, total: Tensor) -> None:
        """Add tokens to the upper triangle of a Gram matrix."""


def gram_kernel(kernels: Kernels, x: Tensor) -> AddUpper | None:
    """The kernel that adds tokens [tokens, in] to a Gram matrix, or None where matrix products do."""
    reason = None if x.shape[1] >= WIDE else f"{x.shape[1]} inputs have too few tiles"
    if x.data_ptr() % 16 or x.shape[1] % 8 or x.dtype not in (torch.bfloat16, torch.float16) or not len(x):
        reason = "rows are not aligned floats of 16 bits"
    if not runs_triton(kernels, x.device, reason):
        return None
    from sparsekit.kernels.products import add_upper  # noqa: PLC0415 - imports Triton

    return add_upper


def settle_kernel(kernels: Kernels, weight: Tensor, pattern: Pattern | None) -> Settle | None:
    """The kernel for blocks of up to `WIDEST` columns of a sweep, or None where the reference runs.

    Args:
        kernels: The setting.
        weight: What is swept.
        pattern: N:M that the kernel is to choose.
    """
    reason = None if weight.dtype == torch.float32 else f"the weight is {weight.dtype}"
    if pattern is not None and pattern.m > TURN:
        reason = f"groups of {pattern.m} are longer than {TURN}"
    if not runs_triton(kernels, weight.device, reason):
        return None
    from sparsekit.kernels.settle import settle_  # noqa: PLC0415 - imports Triton

    return settle_


def fit_kernel(kernels: Kernels, weight: Tensor) -> Fit | None:
    """The kernel that fits the grids of a weight [..., group], or None where the reference runs."""
    reason = None if weight.dtype == torch.float32 else f"the weight is {weight.dtype}"
    if weight.numel() == 0:
        reason = "the weight is empty"
    if not runs_triton(kernels, weight.device, reason):
        return None
    from sparsekit.kernels.grids import fit  # noqa: PLC0415 - imports Triton

    return fit


def mask_kernel(kernels: Kernels, score: Tensor, norm: Tensor | None, pattern: Pattern) -> Mask | None:
    """The kernel that chooses N:M masks, or None where the reference runs."""
    reason = None
    if pattern.m not in (2, 4, 8, 16, LONGEST):
        reason = f"pattern {pattern} has no groups of 2, 4, 8, 16 or {LONGEST}"
    elif score.dtype not in FLOATS or not score.is_contiguous() or score.numel() == 0:
        reason = "scores are no contiguous floats"
    elif norm is not None and (norm.dtype != torch.float32 or not norm.is_contiguous()):
        reason = "norms are no contiguous float32"
    if not runs_triton(kernels, score.device, reason):
        return None
    from sparsekit.kernels.masks import nm_mask  # noqa: PLC0415 - imports Triton

    return nm_mask
