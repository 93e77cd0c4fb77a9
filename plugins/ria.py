"""RIA: relative importance and activations (Zhang et al. 2024, ICLR, "Plug-and-Play")."""

import sparsekit as sk


@sk.linear_method("ria", kind="prune", stats=sk.InputNorm)
def ria(
    layer: sk.LinearState, x: sk.InputNorm, /, *, pattern: sk.Pattern = sk.Pattern(2, 4), power: float = 0.5
) -> sk.LinearState:
    """Keep the highest relative importance times input norm^power; values are not updated.

    Relative importance is |w| as a share of its row plus |w| as a share of its column, which keeps
    a weak row or channel from being emptied.

    Args:
        pattern: "N:M", or unstructured through `sparsity`.
        power: Exponent of the input norm; 0.5 in the paper.

    Source: Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large
    Language Models", ICLR, eq. 2-3.

    Deviations: the paper's channel permutation is a step of its own, `permute` in permute.py.
    """
    size = layer.source.abs()
    share = size / size.sum(1, keepdim=True).clamp(min=1e-30) + size / size.sum(0, keepdim=True).clamp(min=1e-30)
    return layer.masked(pattern.keep(share * x.norm**power))
