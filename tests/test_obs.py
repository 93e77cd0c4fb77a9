"""The sweep against optimal brain surgery by the book, in float64."""

from __future__ import annotations

import brute
import pytest
import torch

from sparsekit.errors import MethodError
from sparsekit.pattern import Pattern
from sparsekit.quant import Grid, Rounding
from sparsekit.stats import Gram
from sparsekit.sweep.obs import sweep
from sparsekit.sweep.root import Root
from sparsekit.sweep.solve import best

HALF = Pattern.unstructured(0.5)
INT4 = Rounding(bits=4, group_size=8)
ANY = {
    "2:4": {"pattern": Pattern(2, 4)},
    "1:8": {"pattern": Pattern(1, 8)},
    "unstructured": {"pattern": HALF},
    "int4": {"rounding": INT4},
    "int3 asymmetric": {"rounding": Rounding(3, 16, symmetric=False)},
    "static": {"rounding": Rounding(4, 8, static=True)},
    "one group a row": {"rounding": Rounding(4, 32)},
    "2:4 and int4": {"pattern": Pattern(2, 4), "rounding": INT4},
    "unstructured and int4": {"pattern": HALF, "rounding": INT4},
}


def frozen(weight, gram):
    """A mask as Wanda would choose it."""
    return Pattern(2, 4).keep(weight.abs() * gram.diagonal().sqrt())


def root_of(gram):
    """The upper root G of a Gram matrix, G Gᵀ."""
    return Root(torch.linalg.cholesky(gram.flip(0, 1)).flip(0, 1))


@pytest.fixture(params=[0, 1, 2])
def drawn(request):
    return brute.problem(seed=request.param)


def test_factor_is_the_first_row_of_what_is_left():
    _, gram = brute.problem()
    factor = brute.factor_of(gram)
    for i in range(len(gram)):
        left = torch.linalg.inv(gram[i:, i:])
        assert torch.allclose(factor[i, i] ** 2, left[0, 0], rtol=1e-10)
        assert torch.allclose(factor[i, i:] * factor[i, i], left[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ANY)
@pytest.mark.parametrize("block", [4, 8, 128])
def test_loss_identity(drawn, kind, block):
    weight, gram = drawn
    swept = sweep(weight, brute.factor_of(gram), block=block, **ANY[kind])
    assert torch.allclose(swept.loss, brute.loss_of(weight, swept.weight, gram), rtol=1e-10)


def test_loss_identity_with_a_frozen_mask_and_an_order(drawn):
    weight, gram = drawn
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    factor = brute.factor_of(gram[order][:, order])
    swept = sweep(weight, factor, order=order, mask=frozen(weight, gram), rounding=INT4)
    assert torch.allclose(swept.loss, brute.loss_of(weight, swept.weight, gram), rtol=1e-10)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(4, 8), Pattern(1, 2), Pattern(5, 16)], ids=str)
def test_sparsegpt_by_the_book(drawn, pattern):
    weight, gram = drawn
    result, keep, _ = brute.surgery(weight, gram, pattern=pattern)
    swept = sweep(weight, brute.factor_of(gram), pattern=pattern)
    assert torch.equal(swept.keep, keep)
    assert torch.allclose(swept.weight, result, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [4, 16, 32])
def test_gptq_by_the_book(drawn, group, symmetric):
    weight, gram = drawn
    result, _, codes = brute.surgery(weight, gram, bits=3, group=group, symmetric=symmetric)
    swept = sweep(weight, brute.factor_of(gram), rounding=Rounding(3, group, symmetric=symmetric))
    assert torch.equal(swept.codes, codes)
    assert torch.allclose(swept.weight, result, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("symmetric", [True, False])
def test_masked_gptq_by_the_book(drawn, symmetric):
    weight, gram = drawn
    mask = frozen(weight, gram)
    result, _, codes = brute.surgery(weight, gram, mask=mask, bits=4, group=8, symmetric=symmetric)
    swept = sweep(weight, brute.factor_of(gram), mask=mask, rounding=Rounding(4, 8, symmetric=symmetric))
    assert torch.equal(swept.codes, codes)
    assert torch.equal(swept.keep, mask)
    assert torch.allclose(swept.weight, result, rtol=1e-9, atol=1e-9)
    assert not swept.weight[~mask].any()
    assert not torch.signbit(swept.weight[~mask]).any()


def test_joint_by_the_book(drawn):
    weight, gram = drawn
    result, keep, codes = brute.surgery(weight, gram, pattern=Pattern(2, 4), bits=4, group=8)
    swept = sweep(weight, brute.factor_of(gram), pattern=Pattern(2, 4), rounding=INT4)
    assert torch.equal(swept.keep, keep)
    assert torch.equal(swept.codes, codes)
    assert torch.allclose(swept.weight, result, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [kind for kind in ANY if "unstructured" not in kind])
def test_blocks_do_not_matter(kind):
    weight, gram = brute.problem(rows=5, columns=96, tokens=200)
    factor = brute.factor_of(gram)
    whole = sweep(weight, factor, block=96, **ANY[kind])
    for block in (1, 4, 8, 12, 32, 50, 128):
        cut = sweep(weight, factor, block=block, **ANY[kind])
        assert torch.allclose(cut.weight, whole.weight, rtol=1e-9, atol=1e-9), block
        for name in ("keep", "codes"):
            one, other = getattr(cut, name), getattr(whole, name)
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other), (name, block)


@pytest.mark.parametrize("pattern", [Pattern(2, 3), Pattern(16, 32), Pattern(3, 5), Pattern(1, 24)], ids=str)
def test_any_n_of_m(pattern):
    columns = pattern.m * 9  # more than one block for M = 32 and 24
    weight, gram = brute.problem(rows=4, columns=columns, tokens=300)
    swept = sweep(weight, brute.factor_of(gram), pattern=pattern)
    kept = (swept.weight != 0).reshape(4, -1, pattern.m).sum(-1)
    assert (kept == pattern.n).all()
    again = sweep(weight, brute.factor_of(gram), pattern=pattern, block=pattern.m)
    assert torch.allclose(again.weight, swept.weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("group", [24, 48, 96, 192])
def test_groups_that_do_not_divide_a_block(group):
    weight, gram = brute.problem(rows=3, columns=192, tokens=300)
    rounding = Rounding(4, group)
    swept = sweep(weight, brute.factor_of(gram), rounding=rounding)
    single = sweep(weight, brute.factor_of(gram), rounding=rounding, block=1)
    assert torch.equal(swept.codes, single.codes)
    joint = sweep(weight, brute.factor_of(gram), rounding=rounding, pattern=Pattern(2, 4), block=20)
    again = sweep(weight, brute.factor_of(gram), rounding=rounding, pattern=Pattern(2, 4))
    assert torch.equal(joint.codes, again.codes)


@pytest.mark.parametrize("kind", ANY)
@pytest.mark.parametrize("block", [4, 12, 32, 128])
def test_the_root_does_what_the_factor_of_the_inverse_does(kind, block):
    weight, gram = brute.problem(rows=5, columns=96, tokens=200)
    arguments = ANY[kind]
    rounding = arguments.get("rounding")
    if rounding and not rounding.static and block < rounding.group_size < 96:
        block = rounding.group_size
    expected = sweep(weight, brute.factor_of(gram), block=block, **arguments)
    whole = root_of(gram)
    panels = Root(*(whole.matrix[: start + 40, start : start + 40] for start in (0, 40, 80)))
    for root in (whole, panels):
        found = sweep(weight, root, block=block, **arguments)
        assert torch.allclose(found.weight, expected.weight, rtol=1e-9, atol=1e-9)
        assert torch.allclose(found.loss, expected.loss, rtol=1e-9)
        for name in ("keep", "codes"):
            one, other = getattr(found, name), getattr(expected, name)
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other), name


def test_the_root_of_gram_statistics():
    torch.manual_seed(0)
    gram = Gram.empty(24, torch.device("cpu"))
    gram.update(torch.randn(200, 24) @ torch.randn(24, 24))
    order = torch.randperm(24)
    for given in (None, order):
        factor, used = gram.inverse_factor(0.01, given)
        root, same = gram.root(0.01, given)
        assert used == same
        assert torch.allclose(root.matrix @ factor, torch.eye(24), atol=1e-4)
        assert not root.matrix.tril(-1).any()
        assert gram.root(0.01, given)[0] is root


def test_groups_longer_than_a_block_need_the_inverse():
    weight, gram = brute.problem(rows=5, columns=96, tokens=200)
    with pytest.raises(MethodError, match="groups of 48 are longer than a block"):
        sweep(weight, root_of(gram), block=32, rounding=Rounding(4, 48))
    sweep(weight, root_of(gram), block=32, rounding=Rounding(4, 96))  # fitted before anything moves


@pytest.mark.parametrize("kind", ANY)
def test_scale_of_the_gram_matrix_does_not_matter(drawn, kind):
    weight, gram = drawn
    one = sweep(weight, brute.factor_of(gram), **ANY[kind])
    other = sweep(weight, brute.factor_of(gram * 1024), **ANY[kind])
    assert torch.allclose(one.weight, other.weight, rtol=1e-12, atol=1e-12)


def test_joint_limits(drawn):
    weight, gram = drawn
    factor = brute.factor_of(gram)
    nothing = sweep(weight, factor, pattern=Pattern.unstructured(0.0), rounding=INT4)
    assert torch.equal(nothing.codes, sweep(weight, factor, rounding=INT4).codes)
    pruned = sweep(weight, factor, pattern=Pattern(2, 4))
    fine = sweep(weight, factor, pattern=Pattern(2, 4), rounding=Rounding(20, 32))  # steps of 6e-5 up to 32
    assert torch.equal(fine.keep, pruned.keep)
    assert torch.allclose(fine.weight, pruned.weight, atol=2e-3)
    kept = sweep(weight, factor, mask=torch.ones_like(weight, dtype=torch.bool), rounding=INT4)
    assert torch.equal(kept.codes, sweep(weight, factor, rounding=INT4).codes)


def test_exact_counts_with_ties_and_odd_blocks():
    _, gram = brute.problem(columns=30, tokens=90)
    weight = torch.randint(-2, 3, (7, 30), generator=torch.Generator().manual_seed(0)).double()
    for sparsity in (0.0, 0.1, 1 / 3, 0.5, 0.77, 1.0):
        for block in (8, 30, 128):
            swept = sweep(weight, brute.factor_of(gram), pattern=Pattern.unstructured(sparsity), block=block)
            assert int((~swept.keep).sum()) == int(sparsity * 210)
    assert not swept.weight.any()


def test_nothing_pruned_is_bit_identical():
    weight, gram = brute.problem(dtype=torch.float32)
    swept = sweep(weight, brute.factor_of(gram), pattern=Pattern.unstructured(0.0))
    assert torch.equal(swept.weight, weight)
    assert swept.keep.all()


def test_unstructured_mask_is_the_cheapest_of_each_block():
    weight, gram = brute.problem(columns=32)
    factor = brute.factor_of(gram)
    swept = sweep(weight, factor, pattern=HALF, block=32)
    assert torch.equal(swept.keep, HALF.keep((weight / factor.diagonal()).abs(), per="layer"))


def test_order_is_a_permuted_problem(drawn):
    weight, gram = drawn
    order = torch.argsort(gram.diagonal(), descending=True)
    permuted = gram[order][:, order]
    factor, inverse = brute.factor_of(permuted), torch.argsort(order)
    ordered = sweep(weight, factor, order=order, rounding=INT4)
    plain = sweep(weight[:, order], factor, rounding=INT4)
    assert torch.equal(ordered.weight, plain.weight[:, inverse])
    assert torch.equal(ordered.codes, plain.codes[:, inverse])
    assert torch.equal(ordered.group_of[order], torch.arange(32) // 8)
    assert torch.equal(ordered.grid.scale, plain.grid.scale)


def test_static_grids_keep_their_columns(drawn):
    weight, gram = drawn
    order = torch.argsort(gram.diagonal(), descending=True)
    mask = frozen(weight, gram)
    rounding = Rounding(4, 8, symmetric=False, static=True)
    factor = brute.factor_of(gram[order][:, order])
    swept = sweep(weight, factor, order=order, mask=mask, rounding=rounding)
    fitted = Grid.fit(weight.masked_fill(~mask, 0.0).reshape(6, 4, 8), 4, symmetric=False)
    assert torch.equal(swept.grid.scale, fitted.scale)
    assert torch.equal(swept.grid.zero, fitted.zero)
    assert torch.equal(swept.group_of, torch.arange(32) // 8)
    scale, zero = (each.repeat_interleave(8, 1)[:, order] for each in (fitted.scale, fitted.zero))
    _, _, codes = brute.surgery(
        weight[:, order], gram[order][:, order], mask=mask[:, order], bits=4, grids=(scale, zero)
    )
    assert torch.equal(swept.codes[:, order], codes)


def test_input_is_not_modified():
    weight, gram = brute.problem()
    factor, before = brute.factor_of(gram), weight.clone()
    kept = factor.clone()
    sweep(weight, factor, pattern=Pattern(2, 4), rounding=INT4)
    assert torch.equal(weight, before)
    assert torch.equal(factor, kept)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": Pattern(2, 5)}, "do not divide"),
        ({"pattern": Pattern(3, 16), "rounding": INT4}, "no multiple of 16"),
        ({"pattern": Pattern(2, 4), "mask": torch.ones(6, 32, dtype=torch.bool)}, "not both"),
    ],
)
def test_misfits_are_named(arguments, message):
    weight, gram = brute.problem()
    with pytest.raises(MethodError, match=message):
        sweep(weight, brute.factor_of(gram), **arguments)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 3), Pattern(7, 8), Pattern(16, 32)], ids=str)
def test_best_is_the_choice_of_pattern_keep(pattern):
    generator = torch.Generator().manual_seed(0)
    shape = (pattern.m, 50)
    for score in (torch.rand(shape, generator=generator), torch.randint(0, 3, shape, generator=generator).float()):
        assert torch.equal(best(score, pattern.n), pattern.keep(score.t()).t())
