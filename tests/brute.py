"""Optimal brain surgery by the book: the inverse of what is left of H, anew at every column."""

from __future__ import annotations

import torch

from sparsekit.quant import Grid


def problem(rows=6, columns=32, tokens=96, seed=0, dtype=torch.float64):
    """A weight [rows, columns] and the damped Gram matrix of correlated inputs with a few large channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator, dtype=dtype)
    x = x @ (torch.eye(columns, dtype=dtype) + 0.3 * torch.randn(columns, columns, generator=generator, dtype=dtype))
    x *= 1 + 4 * torch.rand(columns, generator=generator, dtype=dtype) ** 4
    gram = x.t() @ x / tokens
    gram += 0.01 * gram.diagonal().mean() * torch.eye(columns, dtype=dtype)
    return torch.randn(rows, columns, generator=generator, dtype=dtype), gram


def factor_of(gram):
    """U with inv(gram) = UᵀU, by way of the explicit inverse."""
    return torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)


def surgery(weight, gram, *, pattern=None, mask=None, bits=None, group=None, symmetric=True, grids=None):
    """What `sweep` computes, one row and one column at a time.

    Args:
        grids: Scale and zero-point of every entry, fitted beforehand; else fitted at group starts.
    Returns:
        q [rows, columns], mask [rows, columns] and codes [rows, columns].
    """
    weight, columns = weight.clone(), weight.shape[1]
    keep = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask.clone()
    codes = torch.zeros_like(weight)
    result = torch.zeros_like(weight)
    for i in range(columns):
        inverse = torch.linalg.inv(gram[i:, i:])
        if bits and grids is None and i % group == 0:
            grid = Grid.fit(
                weight[:, i : i + group].masked_fill(~keep[:, i : i + group], 0.0), bits, symmetric=symmetric
            )
        if pattern and i % pattern.m == 0:
            for row in range(len(weight)):
                group_of_m = range(i, i + pattern.m)
                cost = {j: float(weight[row, j] ** 2 / torch.linalg.inv(gram[j:, j:])[0, 0]) for j in group_of_m}
                for j in sorted(group_of_m, key=lambda j: (-cost[j], j))[pattern.n :]:
                    keep[row, j] = False
        for row in range(len(weight)):
            value = weight[row, i].clone()
            q = value
            if bits:
                scale, zero = (grid.scale[row], grid.zero[row]) if grids is None else (g[row, i] for g in grids)
                code = torch.clamp(torch.round(value / scale + zero), 0, 2**bits - 1)
                code = code if keep[row, i] else zero
                codes[row, i] = code
                q = (code - zero) * scale
            q = q if keep[row, i] else torch.zeros_like(value)
            result[row, i] = q
            weight[row, i:] -= (value - q) / inverse[0, 0] * inverse[0]
    return result, keep, codes


def loss_of(weight, result, gram):
    """tr((W - Q) H (W - Q)ᵀ)."""
    change = weight - result
    return ((change @ gram) * change).sum()
