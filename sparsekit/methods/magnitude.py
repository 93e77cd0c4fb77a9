"""Magnitude pruning."""

from sparsekit.pattern import Pattern, Scope
from sparsekit.registry import linear_method
from sparsekit.state import LinearState


@linear_method("magnitude", kind="prune")
def magnitude(layer: LinearState, /, *, pattern: Pattern = Pattern(2, 4), per: Scope = "layer") -> LinearState:
    """Keep the largest |weight|; no calibration data, values are not updated.

    Args:
        pattern: "N:M", or unstructured through `sparsity`.
        per: For unstructured sparsity, compare over the whole `layer` or inside each `row`.

    Source: Han et al. 2015, arXiv:1506.02626; the baseline of arXiv:2301.00774 and arXiv:2306.11695.

    Deviations: exactly floor(sparsity · count) entries are zeroed. The threshold form of the
    references zeroes one more, and every tie, which in bfloat16 is many.
    """
    return layer.masked(pattern.keep_weights(layer.source, per=per))
