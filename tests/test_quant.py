"""Grids and integers: idempotence, exact zeros, one-sided groups, stored precision."""

from __future__ import annotations

import pytest
import torch

from sparsekit.errors import MethodError
from sparsekit.quant import Grid, QuantizedWeight, resolve_group_size, store_scale

FORMS = [(bits, symmetric, mse) for bits in (2, 3, 4, 8) for symmetric in (True, False) for mse in (True, False)]
form = pytest.mark.parametrize(("bits", "symmetric", "mse"), FORMS)


def groups(seed=0):
    """Groups of 16 of many kinds: normal, positive, negative, tiny, large, constant, sparse and zero."""
    w = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
    w[1], w[2] = w[1].abs() + 0.1, -w[2].abs() - 0.1
    w[3], w[4], w[5] = w[3] * 1e-4, w[4] * 1e3, 0.7
    w[6, ::2] = 0.0
    w[7] = 0.0
    return w


@form
def test_rounding_twice_is_rounding_once(bits, symmetric, mse):
    w = groups()
    grid = Grid.fit(w, bits, symmetric=symmetric, mse=mse)
    once = grid.round(w)
    assert torch.equal(grid.round(once), once)
    assert torch.isfinite(once).all()
    codes = grid.encode(w)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1


@form
def test_zero_is_stored_exactly(bits, symmetric, mse):
    w = groups()
    rounded = Grid.fit(w, bits, symmetric=symmetric, mse=mse).round(w)
    zeros = rounded[w == 0]
    assert not zeros.any()
    assert not torch.signbit(zeros).any()


@form
def test_scale_and_zero_have_their_stored_precision(bits, symmetric, mse):
    grid = Grid.fit(groups(), bits, symmetric=symmetric, mse=mse)
    assert torch.equal(grid.scale, grid.scale.half().float())
    assert torch.equal(grid.zero, grid.zero.to(torch.uint8).float())
    assert (grid.scale > 0).all()
    if symmetric:
        assert (grid.zero == 2 ** (bits - 1)).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_levels(bits):
    w = torch.tensor([[-1.0, 1.0, 0.25]])
    grid = Grid.fit(w, bits)
    assert grid.scale.item() == pytest.approx(2 / (2**bits - 1), rel=1e-3)
    levels = (torch.arange(2**bits) - 2 ** (bits - 1)) * grid.scale
    assert torch.equal(grid.round(levels.unsqueeze(0)), levels.unsqueeze(0))
    assert levels[0] == -(levels[1:].max() + grid.scale)


def test_one_sided_symmetric_group_is_not_clipped():
    # the reference mirrors only rows with a negative value and clips this one to 7/15 of its range
    w = torch.linspace(0, 1, 16).unsqueeze(0)
    for sign in (1, -1):
        grid = Grid.fit(sign * w, 4)
        fits = (sign * w).abs() <= 7.5 * grid.scale
        error = (grid.round(sign * w) - sign * w).abs()
        assert (error[fits] <= grid.scale / 2 * (1 + 1e-3)).all()
        assert error.max() <= grid.scale * 0.51


@pytest.mark.parametrize("sign", [1, -1])
def test_asymmetric_range_holds_zero(sign):
    w = sign * torch.linspace(5, 6, 16).unsqueeze(0)
    grid = Grid.fit(w, 4, symmetric=False)
    assert ((grid.round(w) - w).abs() <= grid.scale / 2 * (1 + 1e-2)).all()
    assert grid.zero.item() in (0, 15)


def test_mse_never_loses_and_wins_with_an_outlier():
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    w[:, 0] *= 8
    for symmetric in (True, False):
        losses = [
            (Grid.fit(w, 3, symmetric=symmetric, mse=mse).round(w) - w).abs().pow(2.4).sum(1) for mse in (False, True)
        ]
        assert (losses[1] <= losses[0]).all()
        assert (losses[1] < losses[0]).float().mean() > 0.9


def test_scales_neither_vanish_nor_overflow():
    stored = store_scale(torch.tensor([1e-12, 0.1, 1e9]))
    assert torch.isfinite(stored).all()
    assert (stored > 0).all()
    assert torch.equal(stored, stored.half().float())


@form
def test_integers_reproduce_the_rounded_weight_bit_for_bit(bits, symmetric, mse):
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(6, 32, generator=generator)
    w = w.masked_fill(torch.rand(6, 32, generator=generator) < 0.5, 0.0)
    grid = Grid.fit(w.reshape(6, 4, 8), bits, symmetric=symmetric, mse=mse)
    codes = grid.encode(w.reshape(6, 4, 8)).reshape(6, 32)
    quantized = QuantizedWeight.of(codes, grid, group_size=8, symmetric=symmetric)
    values = quantized.dequantize()
    assert torch.equal(values, grid.round(w.reshape(6, 4, 8)).reshape(6, 32))
    assert not torch.signbit(values[w == 0]).any()
    assert (quantized.codes.dtype, quantized.scale.dtype, quantized.zero.dtype) == (
        torch.uint8,
        torch.float16,
        torch.uint8,
    )
    assert torch.equal(quantized.group_of, (torch.arange(32) // 8).int())


def test_permuted_groups():
    group_of = torch.tensor([0, 1, 0, 1])
    grid = Grid(torch.tensor([[1.0, 10.0]]), torch.tensor([[8.0, 8.0]]), 4)
    quantized = QuantizedWeight.of(
        torch.tensor([[9.0, 9, 10, 10]]), grid, group_size=2, symmetric=True, group_of=group_of
    )
    assert quantized.dequantize().tolist() == [[1, 10, 2, 20]]


def test_group_size():
    assert resolve_group_size(-1, 48) == 48
    assert resolve_group_size(16, 48) == 16
    with pytest.raises(MethodError, match="sizes that do: 16, 8, or -1"):
        resolve_group_size(128, 48)
    with pytest.raises(MethodError, match=r"none of 8\.\.256"):
        resolve_group_size(128, 7)
    for size in (0, -2):
        with pytest.raises(MethodError, match=f"group_size {size} is no number of inputs"):
            resolve_group_size(size, 48)
