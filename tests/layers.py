"""A layer and its calibration inputs, for the tests of one-shot methods."""

from __future__ import annotations

import torch

from sparsekit.state import LinearState
from sparsekit.stats import Gram

CPU = torch.device("cpu")


def inputs(tokens=300, columns=64, seed=0):
    """Correlated tokens [tokens, columns] with a few large channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator)
    x = x @ (torch.eye(columns) + 0.2 * torch.randn(columns, columns, generator=generator))
    return x * (1 + 5 * torch.rand(columns, generator=generator) ** 4)


def gram_of(x):
    gram = Gram.empty(x.shape[1], CPU)
    gram.update(x)
    return gram


def layer(rows=24, columns=64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return LinearState("block.linear", torch.randn(rows, columns, generator=generator))
