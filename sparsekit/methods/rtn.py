"""Round to nearest."""

from typing import Annotated

from pydantic import Field

from sparsekit.quant import Grid, QuantizedWeight, resolve_group_size
from sparsekit.registry import linear_method
from sparsekit.state import LinearState

Bits = Annotated[int, Field(ge=2, le=8)]


@linear_method("rtn", kind="quantize")
def rtn(
    layer: LinearState, /, *, bits: Bits = 4, group_size: int = 128, symmetric: bool = True, mse: bool = False
) -> LinearState:
    """Round each weight to the nearest value of its group's grid; no calibration data.

    Args:
        bits: Bits of a code, 2 to 8.
        group_size: Inputs that share a scale; -1 for one group a row.
        symmetric: Levels -2^(b-1)..2^(b-1)-1 around 0; otherwise an integer zero-point per group.
        mse: Search the range for the least |error|^2.4 instead of taking the extremes.

    Source: the round-to-nearest baseline of Frantar et al. 2022, arXiv:2210.17323.
    """
    weight = layer.weight
    size = resolve_group_size(group_size, weight.shape[1])
    grouped = weight.reshape(len(weight), -1, size)  # [out, groups, size]
    grid = Grid.fit(grouped, bits, symmetric=symmetric, mse=mse)
    codes = grid.encode(grouped).reshape(weight.shape)
    return layer.with_quantized(QuantizedWeight.of(codes, grid, group_size=size, symmetric=symmetric))
