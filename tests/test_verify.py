from dataclasses import replace

import pytest
import torch

from sparsekit.errors import MethodError, PatternError
from sparsekit.pattern import Pattern
from sparsekit.quant import Grid, QuantizedWeight
from sparsekit.state import LinearState
from sparsekit.stats import Gram
from sparsekit.verify import relative_error, verified

TWO_OF_FOUR = Pattern(2, 4)


def layer() -> LinearState:
    return LinearState("block.q", torch.randn(8, 16, generator=torch.Generator().manual_seed(1)))


def pruned() -> LinearState:
    state = layer()
    return state.masked(TWO_OF_FOUR.keep(state.source.abs()))


def quantized(state: LinearState) -> LinearState:
    weight = state.weight.reshape(8, 2, 8)
    grid = Grid.fit(weight, 4)
    codes = grid.encode(weight).reshape(8, 16)
    return state.with_quantized(QuantizedWeight.of(codes, grid, group_size=8, symmetric=True))


def test_record_of_a_good_step():
    record = verified(layer(), pruned(), kind="prune", pattern=TWO_OF_FOUR)
    assert (record.sparsity, record.groups, record.violations, record.pattern) == (0.5, 32, 0, "2:4")
    record = verified(pruned(), quantized(pruned()), kind="quantize", pattern=TWO_OF_FOUR)
    assert record.bits == 4
    assert record.violations == 0
    assert record.error_of == "weights"


def test_a_broken_group_is_named_with_its_layer():
    dense_again = replace(pruned(), mask=None)
    with pytest.raises(PatternError, match=r"block\.q: \d+ of 32 groups break the 2:4 pattern"):
        verified(pruned(), dense_again, kind="prune", pattern=TWO_OF_FOUR)


def test_a_quantizer_may_not_change_the_mask():
    other = pruned().masked(~pruned().mask)
    with pytest.raises(PatternError, match="changed the mask"):
        verified(pruned(), quantized(other), kind="quantize", pattern=TWO_OF_FOUR)


def test_a_quantizer_may_not_revive_pruned_weights():
    state = quantized(layer())  # codes of the dense weight
    with pytest.raises(PatternError, match="pruned weights are not zero"):
        verified(pruned(), replace(state, mask=pruned().mask), kind="quantize", pattern=TWO_OF_FOUR)


def test_a_quantizer_must_return_integers():
    with pytest.raises(MethodError, match="no integers"):
        verified(layer(), layer(), kind="quantize", pattern=None)


def test_shape_and_finiteness():
    with pytest.raises(MethodError, match=r"block\.q: .*shape"):
        verified(layer(), LinearState("block.q", torch.ones(2, 2)), kind="prune", pattern=None)
    with pytest.raises(MethodError, match="not finite"):
        verified(layer(), LinearState("block.q", torch.full((8, 16), torch.inf)), kind="prune", pattern=None)


def test_output_error_is_that_of_the_outputs():
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(2))
    gram = Gram.empty(16, torch.device("cpu"))
    gram.update(x)
    before, after = layer().weight, pruned().weight
    error, of = relative_error(before, after, gram)
    expected = ((x @ (before - after).T).square().sum() / (x @ before.T).square().sum()).item()
    assert of == "outputs"
    assert error == pytest.approx(expected, rel=1e-4)
    scale = torch.rand(16) + 0.5
    assert relative_error(before, after * scale, gram, scale)[0] == pytest.approx(expected, rel=1e-3)
