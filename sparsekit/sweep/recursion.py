"""The column recursion as the papers' code runs it, restated in torch: the yardstick of `sparsekit bench`.

One float32 Gram matrix for each linear, kept as a running mean; the factor by Cholesky, inverse and
Cholesky again; then one column after another in a Python loop, in blocks of 128. Written from the
papers' algorithms and the behaviour of their published code, which `docs/benchmarks/oneshot.py` can
run beside it. Nothing else in sparsekit uses it.

Source: Frantar & Alistarh 2023 (SparseGPT), arXiv:2301.00774, Alg. 1; Frantar et al. 2022 (GPTQ),
arXiv:2210.17323, Alg. 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
DAMP = 0.01


class Recursion:
    """One linear on its way through the loop.

    Attributes:
        weight: float32 [out, in].
        gram: float32 [in, in], twice the mean of x xᵀ over samples.
        samples: How many have been added.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.float()
        columns = weight.shape[1]
        self.gram = torch.zeros(columns, columns, device=weight.device)
        self.samples = 0

    def add(self, x: Tensor) -> None:
        """Add one sample, [tokens, in]."""
        self.gram *= self.samples / (self.samples + 1)
        self.samples += 1
        scaled = (2 / self.samples) ** 0.5 * x.t().float()
        self.gram += scaled.matmul(scaled.t())

    def factor(self) -> Tensor:
        """Upper factor of the inverse of the damped Gram matrix; dead inputs lose their weights."""
        gram = self.gram.clone()
        dead = gram.diagonal() == 0
        gram.diagonal()[dead] = 1
        self.weight[:, dead] = 0
        gram.diagonal().add_(DAMP * gram.diagonal().mean())
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
        return upper

    def pruned(self, n: int, m: int) -> Tensor:
        """The weight with n of every m kept."""
        weight, factor = self.weight.clone(), self.factor()
        for start in range(0, weight.shape[1], BLOCK):
            stop = min(start + BLOCK, weight.shape[1])
            block, inner = weight[:, start:stop].clone(), factor[start:stop, start:stop]
            result, errors = torch.zeros_like(block), torch.zeros_like(block)
            dropped = torch.zeros_like(block, dtype=torch.bool)
            for i in range(stop - start):
                column, pivot = block[:, i], inner[i, i]
                if i % m == 0:
                    cost = block[:, i : i + m].square() / inner.diagonal()[i : i + m].square()
                    dropped.scatter_(1, i + torch.topk(cost, m - n, dim=1, largest=False)[1], True)
                value = column.clone()
                value[dropped[:, i]] = 0
                result[:, i] = value
                errors[:, i] = (column - value) / pivot
                block[:, i:] -= errors[:, i].unsqueeze(1).matmul(inner[i, i:].unsqueeze(0))
            weight[:, start:stop] = result
            weight[:, stop:] -= errors.matmul(factor[start:stop, stop:])
        return weight

    def quantized(self, bits: int) -> Tensor:
        """The weight on symmetric grids in groups of 128, which are fitted when the loop reaches them."""
        weight, factor = self.weight.clone(), self.factor()
        levels = 2**bits - 1
        for start in range(0, weight.shape[1], BLOCK):
            stop = min(start + BLOCK, weight.shape[1])
            block, inner = weight[:, start:stop].clone(), factor[start:stop, start:stop]
            result, errors = torch.zeros_like(block), torch.zeros_like(block)
            step = (2 * block.abs().amax(1) / levels).clamp(min=torch.finfo(torch.float16).smallest_normal)
            step = step.half().float()
            for i in range(stop - start):
                column, pivot = block[:, i], inner[i, i]
                code = torch.clamp(torch.round(column / step) + 2 ** (bits - 1), 0, levels)
                value = step * (code - 2 ** (bits - 1))
                result[:, i] = value
                errors[:, i] = (column - value) / pivot
                block[:, i:] -= errors[:, i].unsqueeze(1).matmul(inner[i, i:].unsqueeze(0))
            weight[:, start:stop] = result
            weight[:, stop:] -= errors.matmul(factor[start:stop, stop:])
        return weight
