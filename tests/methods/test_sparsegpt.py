"""SparseGPT: oracles of orders, limits and numerics on top of those of the sweep."""

from __future__ import annotations

import pytest
import torch
from layers import CPU, gram_of, inputs, layer

from sparsekit.errors import MethodError, NumericsError
from sparsekit.methods.sparsegpt import sparsegpt
from sparsekit.methods.wanda import wanda
from sparsekit.pattern import Pattern
from sparsekit.state import LinearState
from sparsekit.stats import Gram, InputNorm
from sparsekit.sweep.obs import sweep
from sparsekit.verify import relative_error, verified

PATTERNS = [Pattern(2, 4), Pattern(4, 8), Pattern(1, 2), Pattern(16, 32), Pattern.unstructured(0.6)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("group_order", ["natural", "descending"])
def test_pattern_holds_exactly_and_is_proven(pattern, group_order):
    given, gram = layer(), gram_of(inputs())
    pruned = sparsegpt(given, gram, pattern=pattern, group_order=group_order)
    record = verified(given, pruned, kind="prune", pattern=pattern, statistic=gram)
    assert record.sparsity == pytest.approx(pattern.sparsity, abs=1 / given.source.numel())
    assert int((~pruned.mask).sum()) == int(pattern.sparsity * given.source.numel())
    assert record.notes == ()


def test_better_than_wanda_better_than_magnitude():
    for seed in range(3):
        given, x = layer(seed=seed), inputs(seed=seed + 10)
        gram, norm = gram_of(x), InputNorm.empty(64, CPU)
        norm.update(x)
        pattern = Pattern(2, 4)
        ours = sparsegpt(given, gram).weight
        natural = sparsegpt(given, gram, group_order="natural").weight
        theirs = wanda(given, norm, pattern=pattern).weight
        largest = given.masked(pattern.keep(given.source.abs())).weight
        errors = [relative_error(given.source, weight, gram)[0] for weight in (ours, natural, theirs, largest)]
        assert errors == sorted(errors)


def test_descending_order_is_a_manual_permutation_of_groups():
    given, gram = layer(), gram_of(inputs())
    groups = gram.sum.diagonal().reshape(-1, 4).sum(1).argsort(descending=True, stable=True)
    order = (4 * groups[:, None] + torch.arange(4)).flatten()
    moved = gram_of(inputs()[:, order])
    by_hand = sparsegpt(LinearState("moved", given.source[:, order]), moved, group_order="natural")
    ours = sparsegpt(given, gram)
    assert torch.equal(ours.mask[:, order], by_hand.mask)
    assert torch.allclose(ours.weight[:, order], by_hand.weight, atol=1e-4)


def test_uncorrelated_inputs_and_no_damping_are_wanda():
    given = layer()
    x = torch.diag(torch.rand(64, generator=torch.Generator().manual_seed(3)) + 0.1)
    norm = InputNorm.empty(64, CPU)
    norm.update(x)
    for group_order in ("natural", "descending"):
        pruned = sparsegpt(given, gram_of(x), damp=0.0, group_order=group_order)
        expected = wanda(given, norm)
        assert torch.equal(pruned.mask, expected.mask)
        assert torch.equal(pruned.weight, expected.weight)


def test_sparsity_0_and_1():
    given, gram = layer(), gram_of(inputs())
    dense = sparsegpt(given, gram, pattern=Pattern.unstructured(0.0))
    assert torch.equal(dense.weight, given.source)
    assert dense.mask.all()
    empty = sparsegpt(given, gram, pattern=Pattern.unstructured(1.0))
    assert not empty.weight.any()
    assert not torch.signbit(empty.weight).any()


def test_repeated_data_and_block_size_change_nothing():
    given, x = layer(), inputs()
    once, gram = sparsegpt(given, gram_of(x)), gram_of(x)
    for _ in range(7):
        gram.update(x)
    again = sparsegpt(given, gram)
    assert torch.equal(once.mask, again.mask)
    assert torch.allclose(once.weight, again.weight, atol=1e-3)
    for block_size in (1, 8, 48, 1024):
        other = sparsegpt(given, gram_of(x), block_size=block_size)
        assert torch.equal(once.mask, other.mask)
        assert torch.allclose(once.weight, other.weight, atol=1e-4)


def test_dead_inputs_are_zeroed_and_noted():
    x = inputs()
    x[:, [3, 40]] = 0.0
    for pattern in PATTERNS:
        pruned = sparsegpt(layer(), gram_of(x), pattern=pattern)
        assert not pruned.weight[:, [3, 40]].any()
        assert torch.isfinite(pruned.weight).all()
        assert pruned.notes == ("2 of 64 inputs were 0 on every token; their weights are set to 0",)


def test_all_inputs_dead():
    pruned = sparsegpt(layer(), gram_of(torch.zeros(8, 64)))
    assert not pruned.weight.any()
    assert Pattern(2, 4).violations(pruned.mask) == 0


def test_duplicated_input_needs_no_more_than_the_damping():
    x = inputs()
    x[:, 1] = x[:, 0]
    pruned = sparsegpt(layer(), gram_of(x))
    assert torch.isfinite(pruned.weight).all()
    assert pruned.notes == ()


def test_fewer_tokens_than_inputs_climbs_the_ladder_and_says_so():
    given, x = layer(), inputs(tokens=16)
    gram, norm = gram_of(x), InputNorm.empty(64, CPU)
    norm.update(x)
    pruned = sparsegpt(given, gram, damp=0.0)
    (note,) = pruned.notes
    assert note.startswith("damping raised from 0 to ")
    theirs = relative_error(given.source, wanda(given, norm).weight, gram)[0]
    assert relative_error(given.source, pruned.weight, gram)[0] <= theirs
    assert sparsegpt(given, gram).notes == ()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_values_that_are_not_finite_are_named(value):
    x = inputs()
    x[5, 5] = value
    with pytest.raises(NumericsError, match="activations are not finite"):
        sparsegpt(layer(), gram_of(x))
    given = layer()
    given.source[0, 0] = value
    with pytest.raises(NumericsError, match=r"block\.linear: weights are not finite"):
        sparsegpt(given, gram_of(inputs()))


def test_misfit_and_no_tokens_are_named():
    with pytest.raises(MethodError, match="do not divide into groups of 12"):
        sparsegpt(layer(), gram_of(inputs()), pattern=Pattern(6, 12))
    with pytest.raises(NumericsError, match="no calibration token"):
        sparsegpt(layer(), Gram.empty(64, CPU))


def test_one_row_one_group_and_equal_weights():
    gram = gram_of(inputs(columns=4))
    given = LinearState("small", torch.ones(1, 4))
    pruned = sparsegpt(given, gram, pattern=Pattern(2, 4))
    assert int(pruned.mask.sum()) == 2
    even = gram_of(torch.eye(8))
    kept = sparsegpt(LinearState("even", torch.ones(3, 8)), even).mask
    assert torch.equal(kept, torch.tensor([True, True, False, False] * 2).expand(3, 8))  # ties keep the lowest index


def test_sweep_loss_is_the_loss_of_the_damped_problem():
    given, gram = layer(), gram_of(inputs())
    factor, used = gram.inverse_factor(0.01)
    swept = sweep(given.source, factor, pattern=Pattern(2, 4))
    damped = gram.matrix + used * gram.matrix.diagonal().mean() * torch.eye(64)
    change = given.source - swept.weight
    assert torch.allclose(swept.loss, ((change @ damped) * change).sum(), rtol=1e-4)


def test_existing_zeros_stay_possible_and_input_is_untouched():
    given = layer()
    given = given.updated(given.source, Pattern(1, 4).keep(given.source.abs()))
    before = given.source.clone()
    pruned = sparsegpt(given, gram_of(inputs()))
    assert Pattern(2, 4).violations(pruned.weight) == 0
    assert torch.equal(given.source, before)
    again = sparsegpt(given, gram_of(inputs()))
    assert torch.equal(again.weight, pruned.weight)
