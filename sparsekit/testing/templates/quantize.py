"""Given name: say here what it is and where it comes from."""

import sparsekit as sk
from sparsekit.quant import resolve_group_size


@sk.linear_method("given_name", kind="quantize")
def given_name(layer: sk.LinearState, /, *, bits: int = 4, group_size: int = 128) -> sk.LinearState:
    """Round to the nearest value of each group's grid; replace the grid or the codes by your own.

    Args:
        bits: Bits of a code, 2 to 8.
        group_size: Inputs that share a scale; -1 for one group a row.

    Source: your paper, its equation.
    """
    size = resolve_group_size(group_size, layer.weight.shape[1])
    grouped = layer.weight.reshape(len(layer.weight), -1, size)  # [out, groups, size]
    grid = sk.Grid.fit(grouped, bits)  # zero is on every grid, so pruned weights stay 0
    codes = grid.encode(grouped).reshape(layer.weight.shape)
    return layer.with_quantized(sk.QuantizedWeight.of(codes, grid, group_size=size, symmetric=True))
