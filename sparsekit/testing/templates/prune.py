"""Given name: say here what it is and where it comes from."""

import sparsekit as sk


@sk.linear_method("given_name", kind="prune", stats=sk.InputNorm)
def given_name(layer: sk.LinearState, x: sk.InputNorm, /, *, pattern: sk.Pattern = sk.Pattern(2, 4)) -> sk.LinearState:
    """Keep the highest |weight| times input norm; replace the score by your own.

    Args:
        pattern: "N:M", or unstructured through `sparsity`.

    Source: your paper, its equation.
    """
    score = layer.source.abs() * x.norm  # [out, in], higher = more important
    return layer.masked(pattern.keep(score))
