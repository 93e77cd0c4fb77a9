"""The compiled one-shot kernels against their references, on a CUDA device."""

import pytest
import torch

from sparsekit.kernels.grids import fit
from sparsekit.kernels.masks import nm_mask
from sparsekit.kernels.settle import settle_
from sparsekit.pattern import Pattern
from sparsekit.quant import Grid, Rounding
from sparsekit.stats import Gram
from sparsekit.sweep.obs import sweep
from sparsekit.sweep.solve import solve_block

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
SWEEPS = {
    "2:4": {"pattern": Pattern(2, 4)},
    "4:8": {"pattern": Pattern(4, 8)},
    "unstructured": {"pattern": Pattern.unstructured(0.5)},
    "int4": {"rounding": Rounding(4, 128)},
    "int4 g32": {"rounding": Rounding(4, 32)},
    "int3 static": {"rounding": Rounding(3, 128, symmetric=False, static=True)},
    "int4 mse": {"rounding": Rounding(4, 128, mse=True)},
    "joint": {"pattern": Pattern(2, 4), "rounding": Rounding(4, 128)},
}


def drawn(rows, columns, seed=0):
    """A weight and the factor of a well mixed Gram matrix."""
    generator = torch.Generator(CUDA).manual_seed(seed)
    x = torch.randn(2 * columns, columns, generator=generator, device=CUDA)
    mixing = torch.randn(columns, columns, generator=generator, device=CUDA)
    gram = Gram.empty(columns, CUDA)
    gram.update(x @ mixing)
    weight = torch.randn(rows, columns, generator=generator, device=CUDA) / columns**0.5
    return weight, gram, gram.inverse_factor(0.01)[0]


def agreement(one, other):
    return float((one == other).double().mean())


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("choice", [None, "mask", Pattern(2, 4), Pattern(3, 8)], ids=str)
def test_a_block_is_settled_as_by_the_reference(choice, bits):
    weight, _, factor = drawn(1008, 128)
    weight = weight.t().contiguous()
    pattern = choice if isinstance(choice, Pattern) else None
    keep = torch.rand(weight.shape, device=CUDA) > 0.5 if choice == "mask" else None
    grid = None
    if bits:
        fitted = Grid.fit_reference(weight.t(), bits, symmetric=False, mse=False)
        grid = Grid(fitted.scale.expand_as(weight).contiguous(), fitted.zero.expand_as(weight).contiguous(), bits)
    expected = solve_block(weight, factor, keep=keep, pattern=pattern, grid=grid)
    q, e = weight.clone(), torch.full_like(weight, torch.nan)
    kept = torch.zeros_like(weight, dtype=torch.bool) if pattern else keep
    codes = torch.full_like(weight, torch.nan) if bits else None
    settle_(q, e, factor.t().contiguous().t(), keep=kept, codes=codes, pattern=pattern, grid=grid)
    if kept is not None:
        assert agreement(kept, expected.keep) > 0.9999
        assert not torch.signbit(q[~kept]).any()
    if codes is not None:
        assert agreement(codes, expected.codes) > 0.9995
    if choice in (None, "mask") and not bits:  # a choice or a code that differs moves the rest of its row
        torch.testing.assert_close(q, expected.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(e, expected.error, rtol=1e-4, atol=1e-4)
    loss, expected_loss = (error.double().square().sum().item() for error in (e, expected.error))
    assert loss == pytest.approx(expected_loss, rel=1e-3)  # 0 where nothing is pruned or rounded


@pytest.mark.parametrize("kind", SWEEPS)
@pytest.mark.parametrize("rooted", [False, True])
def test_a_sweep_with_the_kernel(kind, rooted):
    weight, gram, factor = drawn(1008, 1408)
    order = None
    if "rounding" in SWEEPS[kind] and "pattern" not in SWEEPS[kind]:
        order = torch.argsort(gram.sum.diagonal(), descending=True, stable=True)
        factor, _ = gram.inverse_factor(0.01, order)
    expected = sweep(weight, factor, order=order, kernels="reference", **SWEEPS[kind])
    if rooted:
        factor, _ = gram.root(0.01, order)
    found = sweep(weight, factor, order=order, kernels="triton", **SWEEPS[kind])
    if expected.keep is not None:
        assert agreement(found.keep, expected.keep) > 0.999
        assert not torch.signbit(found.weight[~found.keep]).any()
    if expected.codes is not None:
        assert agreement(found.codes, expected.codes) > 0.995
        assert found.codes.min() >= 0
        assert found.codes.max() <= 15
    assert abs(float(found.loss / expected.loss) - 1) < 1e-3
    change = (weight - found.weight).double()
    matrix = gram.matrix.double()
    ridge = 0.01 * matrix.diagonal().mean() * torch.eye(len(matrix), device=CUDA, dtype=torch.float64)
    true = (change @ (matrix + ridge) * change).sum()
    assert abs(float(found.loss.double() / true) - 1) < 1e-3  # the errors are those of the result


@pytest.mark.parametrize("symmetric", [True, False])
def test_grids_are_the_references(symmetric):
    bits = 3
    generator = torch.Generator(CUDA).manual_seed(1)
    for shape in ((1008, 128), (64, 4096)):
        weight = torch.randn(shape, generator=generator, device=CUDA)
        for view in (weight, weight.t().contiguous().t()) if len(shape) == 2 else (weight,):
            expected = Grid.fit_reference(weight, bits, symmetric=symmetric, mse=False)
            scale, zero = fit(view, bits, symmetric, False)
            assert torch.equal(scale, expected.scale)
            assert torch.equal(zero, expected.zero)
            expected = Grid.fit_reference(weight, bits, symmetric=symmetric, mse=True)
            found = Grid(*fit(view, bits, symmetric, True), bits)
            assert agreement(found.scale, expected.scale) > 0.99  # sums that differ in the last digit
            assert (found._loss(weight) <= expected._loss(weight) * (1 + 1e-5)).all()


@pytest.mark.parametrize(("bits", "levels"), [(2, "odd"), (3, "odd"), (4, "odd"), (4, "six"), (2, "ternary")])
def test_grids_of_other_levels_are_the_references(bits, levels):
    generator = torch.Generator(CUDA).manual_seed(1)
    weight = torch.randn((1008, 128), generator=generator, device=CUDA)
    weight *= Pattern(2, 4).keep(weight.abs())
    weight[5] = 0.0
    for mse in (False, True):
        expected = Grid.fit_reference(weight, bits, symmetric=True, mse=mse, levels=levels)
        found = Grid(*fit(weight, bits, True, mse, levels), bits, levels)
        assert agreement(found.scale, expected.scale) > (0.99 if mse else 0.999999)
        assert (found._loss(weight) <= expected._loss(weight) * (1 + 1e-5)).all()


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(4, 8), Pattern(1, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_the_references(pattern, dtype):
    generator = torch.Generator(CUDA).manual_seed(2)
    for shape in ((333, 720), (1008, 4096)):
        score = torch.randn(shape, generator=generator, device=CUDA).to(dtype)
        score[::3] = score[::3].round()  # ties
        norm = torch.rand(shape[1], generator=generator, device=CUDA)
        found, _ = nm_mask(score, None, pattern, absolute=False)
        assert torch.equal(found, pattern.keep_reference(score.float()))
        found, invalid = nm_mask(score, norm, pattern, absolute=True)
        assert torch.equal(found, pattern.keep_reference(score.float().abs() * norm))
        assert not int(invalid)
    score[3, 5] = torch.nan
    assert int(nm_mask(score, norm, pattern, absolute=True)[1])


@pytest.mark.parametrize("columns", [520, 2056])  # by matrix products, and by the kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gram_matrices_are_as_exact_as_in_float32(columns, dtype):
    generator = torch.Generator(CUDA).manual_seed(3)
    x = (torch.randn(20000, columns, generator=generator, device=CUDA) + 0.5).to(dtype)
    gram, plain = Gram.empty(columns, CUDA), torch.zeros(columns, columns, device=CUDA)
    for part in x.split(7001):
        gram.update(part)
        plain.addmm_(part.float().t(), part.float())
    exact = x.double().t() @ x.double()
    error, reference = ((found.double() - exact).norm() / exact.norm() for found in (gram.sum, plain))
    assert error < max(reference, 5e-7)
    assert torch.equal(gram.sum, gram.sum.t())
    torch.testing.assert_close(gram.abs_mean, x.double().abs().mean(0).float(), rtol=1e-5, atol=0)


def test_energy_is_that_of_float32():
    weight, gram, _ = drawn(300, 512)
    expected = ((weight.double() @ gram.matrix.double()) * weight.double()).sum()
    assert abs(float(gram.energy(weight).double() / expected) - 1) < 1e-4
