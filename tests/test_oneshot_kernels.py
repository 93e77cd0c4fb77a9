"""The one-shot methods' Triton kernels against their references, run by Triton's interpreter on CPU tensors."""

import os
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None or torch.cuda.is_available():
    pytest.skip("for Triton's interpreter; tests/gpu runs the compiled kernels", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported

import brute
from triton.runtime import interpreter

from sparsekit.kernels.grids import fit
from sparsekit.kernels.masks import nm_mask
from sparsekit.kernels.products import add_upper
from sparsekit.kernels.settle import settle_
from sparsekit.pattern import Pattern
from sparsekit.quant import Grid, Rounding
from sparsekit.sweep.obs import sweep
from sparsekit.sweep.root import Root
from sparsekit.sweep.solve import solve_block

PATTERNS = [Pattern(2, 4), Pattern(4, 8), Pattern(1, 2), Pattern(5, 16)]


def block(columns, rows):
    """Weights and the factor of a block, float32."""
    torch.manual_seed(columns)
    x = torch.randn(2 * columns, columns)
    gram = x.t() @ x / columns + 0.1 * torch.eye(columns)
    return torch.randn(columns, rows), torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)


def settled(weight, factor, keep, pattern, grid):
    """`settle_` on copies; what it does not write stays NaN."""
    found = weight.clone(), torch.full_like(weight, torch.nan)
    keep = torch.zeros_like(weight, dtype=torch.bool) if pattern else keep
    codes = None if grid is None else torch.full_like(weight, torch.nan)
    settle_(*found, factor, keep=keep, codes=codes, pattern=pattern, grid=grid)
    return *found, keep, codes


@pytest.mark.parametrize(
    ("choice", "bits"),
    [(None, 4), ("mask", None), ("mask", 4), (Pattern(2, 4), None), (Pattern(3, 8), 4), (Pattern(1, 3), None)],
    ids=str,
)
def test_a_block_is_settled_as_by_the_reference(choice, bits):
    columns, rows = 24, 9  # neither is a power of two
    weight, factor = block(columns, rows)
    pattern = choice if isinstance(choice, Pattern) else None
    keep = torch.rand(columns, rows) > 0.5 if choice == "mask" else None
    grid = None
    if bits:
        scale = (torch.rand(columns, rows) / 4 + 0.1).half().float()
        grid = Grid(scale, torch.randint(0, 16, (columns, rows)).float(), bits)
    expected = solve_block(weight, factor, keep=keep, pattern=pattern, grid=grid)
    layout = factor if bits else factor.t().contiguous().t()
    q, e, kept, codes = settled(weight, layout, keep, pattern, grid)
    torch.testing.assert_close(q, expected.weight, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(e, expected.error, rtol=1e-5, atol=1e-5)
    assert kept is None or torch.equal(kept, expected.keep)
    assert codes is None or torch.equal(codes, expected.codes)
    assert kept is None or not torch.signbit(q[~kept]).any()


def test_ties_keep_the_lowest_index():
    weight, factor = torch.ones(8, 5), torch.eye(8)
    *_, keep, _ = settled(weight, factor, None, Pattern(2, 4), None)
    assert torch.equal(keep, torch.tensor([1, 1, 0, 0] * 2).bool().unsqueeze(1).expand(8, 5))


@pytest.mark.parametrize(
    "arguments",
    [
        {"pattern": Pattern(2, 4)},
        {"pattern": Pattern.unstructured(0.5)},
        {"rounding": Rounding(4, 16)},
        {"rounding": Rounding(3, 12, symmetric=False, static=True)},
        {"pattern": Pattern(2, 4), "rounding": Rounding(4, 48)},
    ],
    ids=["2:4", "unstructured", "int4", "static", "joint"],
)
def test_a_sweep_with_the_kernel(arguments, monkeypatch):
    weight, gram = brute.problem(rows=3, columns=48, tokens=200)
    weight, factor = weight.float(), brute.factor_of(gram).float()
    root = Root(torch.linalg.cholesky(gram.flip(0, 1)).flip(0, 1).float())
    order = torch.arange(48).reshape(-1, 4).flip(0).flatten()
    monkeypatch.setattr("sparsekit.sweep.work.WIDEST", 8)  # several launches a block
    expected = sweep(weight, factor, order=order, block=20, **arguments)
    found = sweep(weight, factor, order=order, block=20, kernels="triton", **arguments)
    rooted = sweep(weight, root, order=order, block=20, kernels="triton", **arguments)
    torch.testing.assert_close(rooted.weight, expected.weight, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)
    for name in ("keep", "codes"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other), name


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("mse", [False, True])
def test_grids_are_the_references(symmetric, mse, monkeypatch):
    if mse:  # the interpreter takes a second for 80 steps
        for module in ("sparsekit.quant", "sparsekit.kernels.grids"):
            monkeypatch.setattr(f"{module}.MSE_STEPS", 6)
    torch.manual_seed(0)
    for shape in ((3, 20), (2, 3, 8), (2, 160)):  # the last needs two chunks
        weight = torch.randn(shape)
        weight[0] = weight[0].abs() if len(shape) == 2 else 0.0
        for view in (weight, weight.t().contiguous().t()) if len(shape) == 2 else (weight,):
            expected = Grid.fit(weight, 3, symmetric=symmetric, mse=mse)
            scale, zero = fit(view, 3, symmetric, mse)
            assert torch.equal(scale, expected.scale)
            assert torch.equal(zero, expected.zero)


@pytest.mark.parametrize(("bits", "levels"), [(2, "odd"), (3, "odd"), (4, "odd"), (4, "six"), (2, "ternary")])
def test_grids_of_other_levels_are_the_references(bits, levels, monkeypatch):
    for module in ("sparsekit.quant", "sparsekit.kernels.grids"):
        monkeypatch.setattr(f"{module}.MSE_STEPS", 6)
    torch.manual_seed(0)
    weight = torch.randn(3, 5, 24)
    weight = weight * Pattern(2, 4).keep(weight.reshape(15, 24).abs()).reshape(weight.shape)
    weight[1, 1] = 0.0
    expected = Grid.fit(weight, bits, mse=True, levels=levels)
    scale, zero = fit(weight, bits, True, True, levels)
    assert torch.equal(scale, expected.scale)
    assert torch.equal(zero, expected.zero)


@pytest.mark.parametrize("pattern", [*PATTERNS, Pattern(20, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_the_references(pattern, dtype):
    torch.manual_seed(0)
    score = torch.randint(-3, 4, (5, 160)).to(dtype)  # full of ties
    norm = torch.rand(160)
    norm[::7] = 0.5
    for absolute in (True, False):
        wide = score.float().abs() if absolute else score.float()
        assert torch.equal(nm_mask(score, None, pattern, absolute=absolute)[0], pattern.keep(wide))
        assert torch.equal(nm_mask(score, norm, pattern, absolute=absolute)[0], pattern.keep(wide * norm))


def test_a_nan_score_is_seen():
    score = torch.randn(3, 64)
    assert not int(nm_mask(score, None, Pattern(2, 4), absolute=True)[1])
    score[2, 5] = torch.nan
    assert int(nm_mask(score, None, Pattern(2, 4), absolute=True)[1])


def test_the_triangle_of_a_gram_matrix(monkeypatch):
    given = interpreter._patch_lang_tensor

    def patched(tensor, scope):  # Triton 3.6 takes an int of an array of one, which NumPy 2.4 refuses
        given(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
    torch.manual_seed(0)
    x = torch.randn(200, 264).half()
    total = torch.zeros(264, 264)
    for part in (x[:130], x[130:]):
        add_upper(part, total)
    exact = x.double().t() @ x.double()
    torch.testing.assert_close(total.triu().double(), exact.triu(), rtol=1e-5, atol=1e-4)
    assert not total[256:, :128].any()  # tiles below the diagonal are left alone
