"""Low-rank branches in closed form, after SLiM (Mozaffari et al. 2024, arXiv:2410.09615)."""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from sparsekit.branch import Branch, hollow, hollow_integers
from sparsekit.crossgram import StreamGram
from sparsekit.errors import MethodError, NumericsError
from sparsekit.methods.gptq import Bits
from sparsekit.quant import QuantizedWeight, Rounding
from sparsekit.registry import linear_method
from sparsekit.state import LinearState

Rank = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


def _branches(values: Mapping[str, Any], out: int, into: int) -> Branch:
    """The shapes of the branch beside a linear."""
    rank, bits, size = min(values["rank"], out, into), values["bits"], values["group_size"]
    if bits is None:
        return hollow(rank, out, into)
    return Branch.of_integers(*(hollow_integers(rank, count, bits, shared(size, count)) for count in (out, into)))


@linear_method("lowrank", kind="branch", stats=StreamGram, dense=True, branches=_branches)
def lowrank(
    layer: LinearState,
    gram: StreamGram,
    /,
    *,
    rank: Rank = 16,
    bits: Bits | None = 4,
    group_size: int = 128,
    share: Share = 0.5,
    owed: Share = 0.0,
    aim_damp: Positive = 0.01,
) -> LinearState:
    """Repair what pruning and rounding cost by a branch of low rank beside the weight, which stays as it is.

    A step after pruners and quantizers. With E what the weight lacks and H the Gram matrix, S and X
    minimise tr((E - S X) H (E - S X)ᵀ): S holds the eigenvectors of E H Eᵀ with the largest
    eigenvalues, and X = Sᵀ E. Rounded factors are fitted one after the other: X is rounded, S is
    solved for anew, and rounded.

    Args:
        rank: Columns of S; a layer with fewer outputs or inputs gets as many as it has.
        bits: Of the factors' integers; None keeps them as floats.
        group_size: Inputs, and outputs, of a direction that share a step; a factor that it does not divide
            has one step a direction.
        share: How far E aims at the outputs of the uncompressed model from the inputs that the layer has
            now, as in alps_aimed; 0 aims at the dense weight. Meant for `schedule: group`.
        owed: How much of what the stream lacks to which the layer adds is part of the aim, as in alps_aimed.
        aim_damp: Ridge that holds the aim near the dense weight, as a fraction of the mean diagonal.

    Source: Mozaffari et al. 2024, arXiv:2410.09615 (SLiM), sec. 3.2, for the branch after one-shot
    compression and its rounding; Li et al. 2025, arXiv:2504.02692 (GPTAQ), for the aim.

    Deviations: SLiM weighs inputs by their mean |x| alone, here the whole Gram matrix does, for which
    the answer is exact. It rounds factors in tiles without solving again.
    """
    if layer.dense is None:
        raise MethodError("lowrank needs the dense weights", layer=layer.name)
    if not torch.isfinite(gram.sum).all():
        raise NumericsError("calibration activations are not finite (inf or NaN in the Gram matrix)")
    target = gram.aimed_at_stream(layer.dense, aim_damp, share, owed) if share or owed else layer.dense
    error, matrix = (target - layer.weight).double(), gram.matrix.double()
    up, down = nearest(error, matrix, min(rank, *error.shape))
    if bits is None:
        return layer.with_branch(Branch(up.float(), down.float(), down.shape[1] // len(down)))
    rounded = integers(down.float(), bits, group_size)
    across = solved(error, matrix, rounded.dequantize().double())
    return layer.with_branch(Branch.of_integers(integers(across.t().float(), bits, group_size), rounded))


def nearest(error: Tensor, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """S [out, rank] and X [rank, in] with the least tr((E - S X) H (E - S X)ᵀ).

    With H = G Gᵀ that is |E G - S X G|², so S X G is E G on its first singular directions, and these
    are eigenvectors of E H Eᵀ: no root of H and no inverse is needed.

    Args:
        error: E, float64 [out, in].
        matrix: H, float64 [in, in].
        rank: Directions.
    """
    vectors = torch.linalg.eigh(error @ matrix @ error.t()).eigenvectors  # in rising order
    up = vectors[:, -rank:].flip(1)
    return up, up.t() @ error


def solved(error: Tensor, matrix: Tensor, down: Tensor) -> Tensor:
    """S with the least tr((E - S X) H (E - S X)ᵀ) for a given X; arguments as in `nearest`."""
    seen = down @ matrix  # [rank, in]
    inner = seen @ down.t()
    inner.diagonal().add_(1e-9 * inner.diagonal().mean().clamp(min=torch.finfo(inner.dtype).tiny))
    across: Tensor = torch.linalg.solve(inner, seen @ error.t())
    return across.t()


def shared(group_size: int, count: int) -> int:
    """Entries of a row of `count` that share a step: a group, where groups divide it, or all."""
    return group_size if group_size > 0 and count % group_size == 0 else count


def integers(factor: Tensor, bits: int, group_size: int) -> QuantizedWeight:
    """A factor [rank, n] on symmetric grids with the searched range.

    Args:
        factor: float32.
        bits: Of a code.
        group_size: Entries of a row that share a step, where it divides the row.
    """
    size = shared(group_size, factor.shape[1])
    rounding = Rounding(bits, size, mse=True)
    grouped = factor.reshape(len(factor), -1, size)
    grid = rounding.fit(grouped)
    return QuantizedWeight.of(grid.encode(grouped).reshape(factor.shape), grid, group_size=size, symmetric=True)
