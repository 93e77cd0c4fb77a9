"""Given name: say here what it is and where it comes from."""

from collections.abc import Iterable

import sparsekit as sk


@sk.allocation_method("given_name")
def given_name(layers: Iterable[sk.Measured], sparsity: float, /, *, spread: float = 0.05) -> dict[str, float]:
    """Prune the first blocks more and the last ones less; replace the lean by your own.

    Args:
        spread: How much more the first block gives than the mean, at most.

    Source: your paper, its equation.
    """
    seen = [(layer.state.name, layer.block, layer.state.source.numel()) for layer in layers]  # no tensor is kept
    last = max(block for _, block, _ in seen) or 1
    lean = {name: 1 - 2 * block / last for name, block, _ in seen}  # 1 at the first block, -1 at the last
    mean = sum(lean[name] * size for name, _, size in seen) / sum(size for _, _, size in seen)
    return {name: sparsity + spread * (lean[name] - mean) for name in lean}  # the mean over weights stays
