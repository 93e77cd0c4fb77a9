"""GPTQ (Frantar et al. 2022, arXiv:2210.17323)."""

from typing import Annotated, Literal

import torch
from pydantic import Field

from sparsekit.quant import QuantizedWeight, Rounding, resolve_group_size
from sparsekit.registry import linear_method
from sparsekit.state import LinearState
from sparsekit.stats import Gram
from sparsekit.sweep.obs import BLOCK, prepared, sweep

Bits = Annotated[int, Field(ge=2, le=8)]
Damp = Annotated[float, Field(ge=0.0)]
ActOrder = Literal["none", "static", "dynamic"]


@linear_method("gptq", kind="quantize", stats=Gram, rowwise=lambda arguments: True)
def gptq(
    layer: LinearState,
    gram: Gram,
    /,
    *,
    bits: Bits = 4,
    group_size: int = 128,
    symmetric: bool = True,
    act_order: ActOrder = "static",
    mse: bool = False,
    damp: Damp = 0.01,
) -> LinearState:
    """Round column by column and repair the error with the columns that are still to come.

    A pruned layer keeps its zeros: a pruned entry is settled at 0, and what that costs is repaired
    like any rounding error. The sweep starts from the values before masking. After a pruner that
    only chose a mask (magnitude, Wanda) these are the dense ones, so pruning is repaired as well.

    Args:
        bits: Bits of a code, 2 to 8.
        group_size: Inputs that share a scale; -1 for one group a row.
        symmetric: Levels -2^(b-1)..2^(b-1)-1 around 0; otherwise an integer zero-point per group.
        act_order: Columns with the largest inputs first. `static`: grids are fitted beforehand and
            groups stay runs of neighbouring inputs; at 3 bits the held-out layer error of a 25 M
            model is 6 % below that of `none`. `dynamic`: groups are runs of the new order
            (`desc_act`), which few engines read. `none`: from left to right.
        mse: Search the range for the least |error|^2.4 instead of taking the extremes.
        damp: Ridge on the Gram matrix, as a fraction of its mean diagonal.

    Source: Frantar et al. 2022, arXiv:2210.17323, Alg. 1; `act_order` from IST-DASLab/gptq.

    Deviations: without `static`, a grid is fitted on the weights as the sweep has left them, also
    for groups smaller than a block, where the reference reads stale ones. Scales are rounded to
    float16 before they are used. Grids are fitted on what is kept; see `Grid.fit` for their form.
    Pruned entries: SparseGPT's rule (arXiv:2301.00774, sec. 3.4) with a frozen mask.
    """
    order = None if act_order == "none" else torch.argsort(gram.sum.diagonal(), descending=True, stable=True)
    size = resolve_group_size(group_size, layer.source.shape[1])
    rounding = Rounding(bits, size, symmetric, mse, static=act_order == "static")
    long = act_order != "static" and BLOCK < size < layer.source.shape[1]  # a grid reaches beyond the block
    layer, factor = prepared(layer, gram, damp, order, inverse=long)
    swept = sweep(layer.source, factor, order=order, mask=layer.mask, rounding=rounding)
    assert swept.codes is not None and swept.grid is not None  # there was a rounding
    quantized = QuantizedWeight.of(
        swept.codes, swept.grid, group_size=size, symmetric=symmetric, group_of=swept.group_of
    )
    return layer.with_quantized(quantized)
