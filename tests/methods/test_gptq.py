"""GPTQ: oracles of masks, orders, grids and numerics on top of those of the sweep."""

from __future__ import annotations

import pytest
import torch
from layers import CPU, gram_of, inputs, layer
from torch import Tensor

from sparsekit.errors import MethodError, NumericsError
from sparsekit.methods.gptq import gptq
from sparsekit.methods.rtn import rtn
from sparsekit.methods.sparsegpt import sparsegpt
from sparsekit.methods.wanda import wanda
from sparsekit.pattern import Pattern
from sparsekit.quant import Grid
from sparsekit.state import LinearState
from sparsekit.stats import Gram, InputNorm
from sparsekit.verify import relative_error, verified

TWO_FOUR = Pattern(2, 4)
ORDERS = ["none", "static", "dynamic"]


def wanda_pruned(given, x):
    norm = InputNorm.empty(x.shape[1], CPU)
    norm.update(x)
    return wanda(given, norm)


def error(given, result, gram):
    return relative_error(given.source, result.weight, gram)[0]


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_are_the_weight_and_beat_rounding(bits, symmetric, act_order):
    given, gram = layer(), gram_of(inputs())
    result = gptq(given, gram, bits=bits, group_size=16, symmetric=symmetric, act_order=act_order)
    verified(given, result, kind="quantize", pattern=None, statistic=gram)
    quantized = result.quantized
    assert int(quantized.codes.max()) < 2**bits
    assert quantized.scale.dtype == torch.float16
    assert torch.equal(quantized.dequantize(), result.source)
    assert torch.equal(quantized.group_of.bincount(), torch.full((4,), 16))
    assert error(given, result, gram) < error(given, rtn(given, bits=bits, group_size=16, symmetric=symmetric), gram)


@pytest.mark.parametrize("act_order", ["none", "static"])
@pytest.mark.parametrize("group_size", [8, 64, -1])
@pytest.mark.parametrize("mse", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_uncorrelated_inputs_are_rounded_to_nearest(symmetric, mse, group_size, act_order):
    given = layer()
    gram = gram_of(torch.diag(torch.rand(64, generator=torch.Generator().manual_seed(3)) + 0.1))
    arguments = {"bits": 3, "group_size": group_size, "symmetric": symmetric, "mse": mse}
    ours, nearest = gptq(given, gram, act_order=act_order, **arguments), rtn(given, **arguments)
    for name in ("codes", "scale", "zero", "group_of"):
        assert torch.equal(getattr(ours.quantized, name), getattr(nearest.quantized, name)), name


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_pruned_entries_stay_exactly_zero(pruner, symmetric, act_order):
    given, x = layer(), inputs()
    gram = gram_of(x)
    pruned = wanda_pruned(given, x) if pruner == "wanda" else sparsegpt(given, gram)
    result = gptq(pruned, gram, group_size=16, symmetric=symmetric, act_order=act_order)
    verified(pruned, result, kind="quantize", pattern=TWO_FOUR, statistic=gram)
    zeros = result.weight[~pruned.mask]
    assert not zeros.any()
    assert not torch.signbit(zeros).any()
    zero_codes = result.quantized.zero.long()[:, result.quantized.group_of.long()]
    assert torch.equal(result.quantized.codes.long()[~pruned.mask], zero_codes[~pruned.mask])


def naive(given: LinearState, gram: Gram) -> Tensor:
    """GPTQ that knows nothing of a mask: the control."""
    return gptq(LinearState(given.name, given.weight), gram, group_size=16).weight


def test_control_without_the_mask_the_pattern_is_lost():
    given, gram = layer(), gram_of(inputs())
    pruned = sparsegpt(given, gram)
    assert TWO_FOUR.violations(pruned.weight) == 0
    assert TWO_FOUR.violations(naive(pruned, gram)) > 0


def test_after_wanda_the_dense_values_are_repaired():
    given, x = layer(), inputs()
    gram, pruned = gram_of(x), wanda_pruned(given, x)
    from_dense = gptq(pruned, gram, group_size=16)
    from_pruned = gptq(pruned.updated(pruned.weight), gram, group_size=16)
    assert error(given, from_dense, gram) < error(given, from_pruned, gram)
    assert error(given, from_dense, gram) < error(given, rtn(pruned, group_size=16), gram)


def test_after_sparsegpt_better_than_rounding_and_than_masking_again():
    for seed in range(3):
        given, gram = layer(seed=seed), gram_of(inputs(seed=seed + 10))
        pruned = sparsegpt(given, gram)
        ours = error(given, gptq(pruned, gram, group_size=16), gram)
        assert ours < error(given, rtn(pruned, group_size=16), gram)
        masked_again = naive(pruned, gram).masked_fill(~pruned.mask, 0.0)
        assert ours < relative_error(given.source, masked_again, gram)[0]


def test_mask_that_keeps_everything_is_plain_gptq():
    given, gram = layer(), gram_of(inputs())
    whole = given.masked(torch.ones_like(given.source, dtype=torch.bool))
    for act_order in ORDERS:
        plain = gptq(given, gram, act_order=act_order, group_size=16)
        masked = gptq(whole, gram, act_order=act_order, group_size=16)
        assert torch.equal(plain.quantized.codes, masked.quantized.codes)
        assert torch.equal(plain.quantized.scale, masked.quantized.scale)


def test_mask_that_keeps_nothing():
    given = layer().masked(torch.zeros(24, 64, dtype=torch.bool))
    for symmetric in (True, False):
        result = gptq(given, gram_of(inputs()), group_size=16, symmetric=symmetric)
        assert not result.weight.any()
        assert torch.isfinite(result.weight).all()


def test_grids_are_fitted_on_what_is_kept():
    given, gram = layer(), gram_of(inputs())
    mask = TWO_FOUR.keep(-given.source.abs())  # the largest are pruned
    result = gptq(given.masked(mask), gram, group_size=16)
    expected = Grid.fit(given.source.masked_fill(~mask, 0.0).reshape(24, 4, 16), 4)
    assert torch.equal(result.quantized.scale.float(), expected.scale)


def test_act_order_is_a_manual_permutation():
    given, x = layer(), inputs()
    order = torch.argsort(gram_of(x).sum.diagonal(), descending=True, stable=True)
    by_hand = gptq(LinearState("moved", given.source[:, order]), gram_of(x[:, order]), group_size=16, act_order="none")
    dynamic = gptq(given, gram_of(x), group_size=16, act_order="dynamic")
    assert torch.allclose(dynamic.weight[:, order], by_hand.weight, atol=1e-4)
    assert torch.equal(dynamic.quantized.group_of[order], torch.arange(64, dtype=torch.int32) // 16)
    for act_order in ("none", "static"):
        fixed = gptq(given, gram_of(x), group_size=16, act_order=act_order)
        assert torch.equal(fixed.quantized.group_of, torch.arange(64, dtype=torch.int32) // 16)


def test_one_sided_group_is_not_clipped():
    given = LinearState("positive", torch.rand(4, 16, generator=torch.Generator().manual_seed(0)) + 0.5)
    result = gptq(given, gram_of(torch.eye(16)), group_size=16)
    step = result.quantized.scale.float()
    assert ((result.weight - given.source).abs() <= step * 0.51 + 1e-6).float().mean() > 0.9
    assert result.weight.max() > 0.9 * given.source.max()


def test_dead_inputs_are_zeroed_noted_and_do_not_stretch_a_grid():
    given, x = layer(), inputs()
    x[:, 3] = 0.0
    given.source[:, 3] = 1000.0
    for act_order in ORDERS:
        result = gptq(given, gram_of(x), group_size=16, act_order=act_order)
        assert not result.weight[:, 3].any()
        assert result.quantized.scale.max() < 10
        assert result.notes == ("1 of 64 inputs were 0 on every token; their weights are set to 0",)


def test_fewer_tokens_than_inputs_climbs_the_ladder_and_says_so():
    given, gram = layer(), gram_of(inputs(tokens=16))
    result = gptq(given, gram, damp=0.0, group_size=16)
    (note,) = result.notes
    assert note.startswith("damping raised from 0 to ")
    assert error(given, result, gram) <= error(given, rtn(given, group_size=16), gram)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_values_that_are_not_finite_are_named(value):
    x = inputs()
    x[5, 5] = value
    with pytest.raises(NumericsError, match="activations are not finite"):
        gptq(layer(), gram_of(x), group_size=16)
    given = layer()
    given.source[0, 0] = value
    with pytest.raises(NumericsError, match=r"block\.linear: weights are not finite"):
        gptq(given, gram_of(inputs()), group_size=16)


def test_misfit_is_named():
    with pytest.raises(MethodError, match="group_size 48 does not divide"):
        gptq(layer(), gram_of(inputs()), group_size=48)


def test_mse_lowers_the_error_at_few_bits_and_runs_are_repeatable():
    given, gram = layer(rows=64), gram_of(inputs())
    searched = gptq(given, gram, bits=2, group_size=16, mse=True)
    plain = gptq(given, gram, bits=2, group_size=16)
    assert error(given, searched, gram) < error(given, plain, gram)
    again = gptq(given, gram, bits=2, group_size=16)
    assert torch.equal(plain.quantized.codes, again.quantized.codes)
