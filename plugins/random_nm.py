"""A control for comparisons: any pruner worth its name beats it."""

import torch

import sparsekit as sk


@sk.linear_method("random_nm", kind="prune")
def random_nm(layer: sk.LinearState, /, *, pattern: sk.Pattern = sk.Pattern(2, 4), seed: int = 0) -> sk.LinearState:
    """Keep random entries of every group.

    Args:
        pattern: "N:M", or unstructured through `sparsity`.
        seed: Of the random scores; every layer of one shape gets the same mask.

    Source: a control, not a method.
    """
    generator = torch.Generator().manual_seed(seed)
    return layer.masked(pattern.keep(torch.rand(layer.source.shape, generator=generator).to(layer.source.device)))
