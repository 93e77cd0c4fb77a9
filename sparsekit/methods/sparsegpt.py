"""SparseGPT (Frantar & Alistarh 2023, arXiv:2301.00774)."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from sparsekit.pattern import Pattern
from sparsekit.registry import linear_method
from sparsekit.state import LinearState
from sparsekit.stats import Gram
from sparsekit.sweep.obs import BLOCK, prepared, sweep

Damp = Annotated[float, Field(ge=0.0)]
BlockSize = Annotated[int, Field(ge=1)]
GroupOrder = Literal["descending", "natural"]


@linear_method("sparsegpt", kind="prune", stats=Gram, rowwise=lambda arguments: arguments["pattern"].structured)
def sparsegpt(
    layer: LinearState,
    gram: Gram,
    /,
    *,
    pattern: Pattern = Pattern(2, 4),
    damp: Damp = 0.01,
    block_size: BlockSize = BLOCK,
    group_order: GroupOrder = "descending",
) -> LinearState:
    """Prune where it costs least and repair with the weights that are still to come.

    An entry's cost is w² / U_jj², with (H + damp·mean(diag H)·I)⁻¹ = UᵀU and w as updated so far.
    Under an N:M pattern costs are compared inside each group, when the sweep reaches it; when
    unstructured, over all rows of a block of columns, so every block gets the same sparsity.

    Args:
        pattern: "N:M", or unstructured through `sparsity`.
        damp: Ridge on the Gram matrix, as a fraction of its mean diagonal.
        block_size: Columns of a block, which matters to an unstructured mask only.
        group_order: Which groups of M columns are settled first: those with the largest inputs
            (`descending`, so that the many small ones to come repair them), or from left to right
            (`natural`, as in the paper). An unstructured pattern is always swept left to right.

    Source: Frantar & Alistarh 2023, arXiv:2301.00774, Alg. 1 and sec. 3.2-3.3.

    Deviations: `group_order`, after GPTQ's activation order; whole groups move, so an N:M pattern
    stays aligned. On a 25 M model, descending lowers the held-out layer error by 1 % and the
    perplexity by 1 % with 112 windows of 1024 tokens; with only 32 it raises the perplexity by 1 %.
    Unstructured, the perplexity of a 4 M model is 1 to 2 % better from left to right.
    Exactly floor(sparsity · count) entries are zeroed, where the reference's threshold takes one
    more and all ties. Ties keep the lowest index. Inputs that were always 0 lose their weights, as
    in the reference.
    """
    order = _group_order(gram, pattern.m) if pattern.structured and group_order == "descending" else None
    layer, factor = prepared(layer, gram, damp, order)
    swept = sweep(layer.source, factor, order=order, pattern=pattern, block=block_size)
    return layer.updated(swept.weight, swept.keep)


def _group_order(gram: Gram, m: int) -> Tensor | None:
    """Columns by descending energy of their group of M, int64 [in]; a group's columns keep their order."""
    energy = gram.sum.diagonal()
    if len(energy) % m:
        return None  # the sweep names the misfit
    groups = torch.argsort(energy.reshape(-1, m).sum(1), descending=True, stable=True)
    return (groups.unsqueeze(1) * m + torch.arange(m, device=groups.device)).flatten()
