"""Erdős-Rényi sparsities: layers with few weights for their neurons stay denser."""

from collections.abc import Iterable

import sparsekit as sk


@sk.allocation_method("erk")
def erk(layers: Iterable[sk.Measured], sparsity: float, /) -> dict[str, float]:
    """Make the density of a layer proportional to (in + out) / (in · out).

    Layers whose density would exceed 1 stay dense, and the others share what is left.

    Source: Mocanu et al. 2018, arXiv:1707.04780, eq. 1; Evci et al. 2020 (RigL), arXiv:1911.11134,
    appendix, for the layers that stay dense.
    """
    shapes = {layer.state.name: tuple(layer.state.source.shape) for layer in layers}
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    ratio = {name: (rows + columns) / sizes[name] for name, (rows, columns) in shapes.items()}
    kept, dense = (1 - sparsity) * sum(sizes.values()), set[str]()
    while True:
        rest = [name for name in shapes if name not in dense]
        budget = kept - sum(sizes[name] for name in dense)
        scale = budget / sum(ratio[name] * sizes[name] for name in rest)
        full = {name for name in rest if scale * ratio[name] > 1}
        if not full:
            break
        dense |= full
    return {name: 0.0 if name in dense else 1 - scale * ratio[name] for name in shapes}
