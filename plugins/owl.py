"""OWL: outlier weighed layerwise sparsity (Yin et al. 2023, arXiv:2310.05175)."""

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

import sparsekit as sk

Positive = Annotated[float, Field(gt=0)]
Spread = Annotated[float, Field(ge=0, lt=0.5)]


@sk.allocation_method("owl", stats=sk.InputNorm)
def owl(
    layers: Iterable[sk.Measured], sparsity: float, /, *, outlier: Positive = 5.0, spread: Spread = 0.08
) -> dict[str, float]:
    """Give blocks with many outlying scores fewer zeros.

    A weight's score is |w| times the norm of its input, as in Wanda; a score above `outlier` times
    the layer's mean is an outlier. The share of outliers in a block, scaled to the range from
    -spread to +spread over all blocks, is taken off its sparsity.

    Args:
        outlier: M of the paper, 5 or 7 there.
        spread: λ of the paper, 0.08 there: a block's sparsity is at most 2 λ from another's.

    Source: Yin et al. 2023, arXiv:2310.05175, eq. 1 and section 3.3; one sparsity for all layers of
    a block as in luuyin/OWL.

    Deviations: the mean is weighted by size, so that the model has the sparsity asked for exactly.
    A share is kept inside 0..0.99.
    """
    shares: dict[int, list[float]] = {}  # block: outliers, weights
    sizes: dict[str, tuple[int, int]] = {}  # layer: block, weights
    for layer in layers:
        assert isinstance(layer.statistic, sk.InputNorm)  # registered so
        score = layer.state.weight.abs() * layer.statistic.norm
        found = shares.setdefault(layer.block, [0.0, 0.0])
        found[0] += float((score > outlier * score.mean()).sum())
        found[1] += score.numel()
        sizes[layer.state.name] = (layer.block, score.numel())
    density = {block: outliers / count for block, (outliers, count) in shares.items()}
    low, high = min(density.values()), max(density.values())
    width = (high - low) or 1.0
    relief = {block: 2 * spread * (value - low) / width for block, value in density.items()}
    total = sum(count for _, count in sizes.values())
    mean = sum(relief[block] * count for block, count in sizes.values()) / total
    return {name: min(max(sparsity + mean - relief[block], 0.0), 0.99) for name, (block, _) in sizes.items()}
