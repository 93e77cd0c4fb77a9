"""Wanda (Sun et al. 2023, arXiv:2306.11695)."""

from sparsekit.pattern import Pattern
from sparsekit.registry import linear_method
from sparsekit.state import LinearState
from sparsekit.stats import InputNorm


@linear_method("wanda", kind="prune", stats=InputNorm)
def wanda(layer: LinearState, x: InputNorm, /, *, pattern: Pattern = Pattern(2, 4)) -> LinearState:
    """Keep the highest |weight| times input norm; values are not updated.

    Scores are compared inside each group of an N:M pattern, and inside each output row when
    unstructured. The values stay in the state, so a GPTQ step after it starts from the dense weight.

    Args:
        pattern: "N:M", or unstructured through `sparsity`.

    Source: Sun et al. 2023, arXiv:2306.11695, eq. 1: S_ij = |W_ij| · ||X_j||_2.

    Deviations: the norm sums over tokens, where the reference averages over sequences and so
    weights short sequences up; ties keep the lowest index.
    """
    return layer.masked(pattern.keep_weights(layer.source, x.norm))
