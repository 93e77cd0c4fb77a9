"""Statistics: the definition, merging, low precision, the factor and its ladder."""

from __future__ import annotations

import pytest
import torch

from sparsekit import quadratic
from sparsekit.errors import NumericsError
from sparsekit.stats import DAMP_LADDER, Gram, InputNorm
from sparsekit.sweep.panels import root_in_panels
from sparsekit.sweep.root import root_in_place

CPU = torch.device("cpu")


def tokens(count=200, columns=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, columns, generator=generator)
    return x @ torch.randn(columns, columns, generator=generator)


def collected(kind, *parts):
    statistic = kind.empty(parts[0].shape[1], CPU)
    for part in parts:
        statistic.update(part)
    return statistic


def test_definitions():
    x = tokens()
    gram, norm = collected(Gram, x), collected(InputNorm, x)
    assert gram.tokens == norm.tokens == 200
    assert torch.allclose(gram.matrix.double(), x.double().t() @ x.double() / 200, rtol=1e-4, atol=1e-3)
    assert torch.allclose(norm.norm, x.square().mean(0).sqrt(), rtol=1e-5)
    assert torch.allclose(gram.norm, norm.norm, rtol=1e-5)
    assert torch.allclose(gram.abs_mean, x.abs().mean(0), rtol=1e-5)


@pytest.mark.parametrize("kind", [Gram, InputNorm])
def test_batches_and_merging_do_not_matter(kind):
    x = tokens()
    whole = collected(kind, x)
    ragged = collected(kind, x[:1], x[1:77], x[77:])
    merged = collected(kind, x[:50])
    merged.merge(collected(kind, x[50:]))
    shuffled = collected(kind, x[torch.randperm(200, generator=torch.Generator().manual_seed(0))])
    for other in (ragged, merged, shuffled):
        assert other.tokens == 200
        assert torch.allclose(whole.norm, other.norm, rtol=1e-5)
    if kind is Gram:
        assert torch.allclose(whole.matrix, merged.matrix, rtol=1e-4, atol=1e-3)
        assert torch.allclose(whole.abs_mean, merged.abs_mean, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_summed_in_float32(dtype):
    x = tokens().to(dtype)
    gram = collected(Gram, x)
    exact = x.double().t() @ x.double() / 200
    assert gram.sum.dtype == torch.float32
    assert float((gram.matrix.double() - exact).norm() / exact.norm()) < 1e-6


def test_factor_of_the_damped_inverse():
    gram = collected(Gram, tokens())
    factor, used = gram.inverse_factor(0.01)
    damped = gram.matrix.double()
    damped += 0.01 * damped.diagonal().mean() * torch.eye(24)
    inverse = torch.linalg.inv(damped)
    assert used == 0.01
    assert torch.equal(factor, factor.triu())
    assert (factor.diagonal() > 0).all()
    assert torch.allclose(factor.double().t() @ factor.double(), inverse, rtol=1e-4, atol=1e-6 * float(inverse.max()))
    for i in range(24):
        assert factor[i, i].double() ** 2 == pytest.approx(float(torch.linalg.inv(damped[i:, i:])[0, 0]), rel=1e-5)
    assert gram.inverse_factor(0.01)[0] is factor  # shared by the linears of a group


def test_factor_in_another_order():
    gram, order = collected(Gram, tokens()), torch.randperm(24, generator=torch.Generator().manual_seed(1))
    moved = collected(Gram, tokens()[:, order])
    factor, _ = gram.inverse_factor(0.01, order)
    assert torch.allclose(factor, moved.inverse_factor(0.01)[0], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(factor, gram.inverse_factor(0.01)[0], rtol=1e-3)


def test_dead_channels_get_a_unit_diagonal():
    x = tokens()
    x[:, 5] = 0.0
    gram = collected(Gram, x)
    assert gram.dead.nonzero().tolist() == [[5]]
    factor, used = gram.inverse_factor(0.01)
    assert used == 0.01
    assert torch.isfinite(factor).all()
    assert not factor[5, 6:].any()
    assert not factor[:5, 5].any()


def test_singular_matrix_is_saved_by_the_damping():
    x = tokens()
    x[:, 1] = x[:, 0]
    factor, used = collected(Gram, x).inverse_factor(0.01)
    assert used == 0.01
    assert torch.isfinite(factor).all()


def test_ladder_is_climbed_and_told():
    gram = collected(Gram, tokens(count=4))
    factor, used = gram.inverse_factor(0.0)
    assert used in [pytest.approx(1e-4 * rung) for rung in DAMP_LADDER[1:]]
    assert torch.isfinite(factor).all()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_not_finite_activations_and_no_tokens_are_errors(value):
    x = tokens()
    x[3, 3] = value
    with pytest.raises(NumericsError, match="not finite"):
        collected(Gram, x).inverse_factor(0.01)
    with pytest.raises(NumericsError, match="no calibration token"):
        Gram.empty(4, CPU).inverse_factor(0.01)


def test_hopeless_matrix_is_an_error():
    gram = collected(Gram, tokens())
    gram.sum.sub_(100 * gram.sum.diagonal().mean() * torch.eye(24))
    with pytest.raises(NumericsError, match="not positive definite even with damping"):
        gram.inverse_factor(0.01)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("count", [200, 10])
def test_the_root_in_place_has_the_bits_of_the_other(ordered, count):
    x = tokens(count)
    x[:, 3] = 0
    gram = collected(Gram, x)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1)) if ordered else None
    before = gram.sum.clone()
    for damp in (0.01, 0.0):  # 10 tokens need a rung of the ladder then
        expected, used = gram.root(damp, order)
        root, found = root_in_place(gram.sum, gram.tokens, gram.ladder, damp, order)
        assert torch.equal(root, expected.matrix)
        assert found == used
        assert (used > damp) == (damp == 0.0 and (count < 24))
    assert torch.equal(gram.sum, before)


def test_the_root_in_place_refuses_what_the_other_refuses():
    gram = collected(Gram, tokens())
    with pytest.raises(NumericsError, match="no calibration token"):
        root_in_place(gram.sum, 0, gram.ladder, 0.01, None)
    with pytest.raises(NumericsError, match=r"not positive definite even with damping 0\.01"):
        root_in_place(-gram.sum, gram.tokens, DAMP_LADDER[:1], 0.01, None)
    gram.update(torch.full((1, 24), torch.inf))
    with pytest.raises(NumericsError, match="not finite"):
        root_in_place(gram.sum, gram.tokens, gram.ladder, 0.01, None)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("count", [200, 10])
@pytest.mark.parametrize("width", [5, 8, 24])
def test_the_root_in_panels_is_the_root(ordered, count, width):
    x = tokens(count)
    x[:, 3] = 0
    gram = collected(Gram, x)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1)) if ordered else None
    before = gram.sum.clone()
    blocks = [(0, 7), (7, 14), (14, 20), (20, 24)]
    for damp in (0.01, 0.0):  # 10 tokens need a rung of the ladder then
        expected, used = gram.root(damp, order)
        root, found = root_in_panels(gram.sum, gram.tokens, gram.ladder, damp, order, width)
        torch.testing.assert_close(root.matrix, expected.matrix, rtol=2e-7, atol=2e-7)
        assert found == used
        for start, inverse in root.inverses(blocks).items():
            torch.testing.assert_close(inverse, expected.inverses(blocks)[start], rtol=1e-6, atol=1e-6)
        for start, stop in blocks:
            (first, whole), *none = (
                expected.right_of(start, stop) if stop < 24 else [(24, torch.empty(stop - start, 0))]
            )
            assert first == stop and not none
            parts = list(root.right_of(start, stop))
            assert torch.allclose(torch.cat([part for _, part in parts] or [whole], dim=1), whole, rtol=2e-7, atol=2e-7)
            assert [at for at, _ in parts][:1] in ([stop], [])
    assert torch.equal(gram.sum, before)


def test_the_root_in_panels_refuses_what_the_other_refuses():
    gram = collected(Gram, tokens())
    with pytest.raises(NumericsError, match="no calibration token"):
        root_in_panels(gram.sum, 0, gram.ladder, 0.01, None)
    with pytest.raises(NumericsError, match=r"not positive definite even with damping 0\.01"):
        root_in_panels(-gram.sum, gram.tokens, DAMP_LADDER[:1], 0.01, None, 8)
    gram.update(torch.full((1, 24), torch.inf))
    with pytest.raises(NumericsError, match="not finite"):
        root_in_panels(gram.sum, gram.tokens, gram.ladder, 0.01, None)


def test_packed_statistics_say_so_to_what_is_made_of_them():
    gram = collected(Gram, tokens())
    gram.packed = True
    assert gram.diagonal().packed and gram.without(torch.zeros(24, dtype=torch.bool)).packed
    torch.testing.assert_close(gram.root(0.01)[0].matrix, collected(Gram, tokens()).root(0.01)[0].matrix)


def test_mirror(monkeypatch):
    monkeypatch.setattr(quadratic, "PANEL", 7)
    matrix = torch.randn(30, 30, generator=torch.Generator().manual_seed(0))
    found = matrix.clone()
    quadratic.mirror_(found)
    assert torch.equal(found, matrix.triu() + matrix.triu(1).t())
