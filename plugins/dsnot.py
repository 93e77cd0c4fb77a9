"""DSnoT: dynamic sparse no training (Zhang et al. 2023, arXiv:2310.08915)."""

from typing import Annotated, Self

import torch
from pydantic import Field
from torch import Tensor

import sparsekit as sk

Cycles = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]


class Moments:
    """Sums of every input channel and of its squares, over tokens: a statistic of our own."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.tokens = 0
        self.sums = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.sums)

    @classmethod
    def empty(cls, in_features: int, device: torch.device) -> Self:
        """No tokens seen yet."""
        return cls(in_features, device)

    def update(self, x: Tensor) -> None:
        """Add tokens [tokens, in]."""
        wide = x.double()
        self.sums += wide.sum(0)
        self.squares += wide.square().sum(0)
        self.tokens += x.shape[0]

    def merge(self, other: Self) -> None:
        """Add another accumulator's sums."""
        self.sums += other.sums.to(self.sums.device)
        self.squares += other.squares.to(self.sums.device)
        self.tokens += other.tokens

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, float32 [in]."""
        return (self.sums / max(self.tokens, 1)).float()

    @property
    def variance(self) -> Tensor:
        """Variance of each channel, float32 [in]."""
        count = max(self.tokens, 1)
        return (self.squares / count - (self.sums / count).square()).clamp(min=0).float()

    @property
    def norm(self) -> Tensor:
        """Root mean square of each channel, float32 [in]."""
        return (self.squares / max(self.tokens, 1)).sqrt().float()


@sk.linear_method("dsnot", kind="prune", stats=Moments)
def dsnot(
    layer: sk.LinearState,
    x: Moments,
    /,
    *,
    pattern: sk.Pattern = sk.Pattern(2, 4),
    cycles: Cycles = 50,
    threshold: NotNegative = 0.1,
) -> sk.LinearState:
    """Swap pruned and kept weights until a row's mean output is that of the dense row; no value changes.

    It starts from the layer's mask when a pruner ran before, and from Wanda's otherwise. In each cycle
    a row whose mean error e = Σ pruned w_j E[x_j] is beyond the threshold revives the weight with the
    largest sign(e) w_j E[x_j] / Var[x_j] and prunes, in its group, the lowest |w_j| ||x_j|| among
    those whose loss moves e towards 0.

    Args:
        pattern: "N:M", or unstructured through `sparsity`. A mask that is there has to be of it.
        cycles: Swaps of a row at most; 50 in the paper.
        threshold: A row is left alone once |e| is no larger; 0.1 in the paper.

    Source: Zhang et al. 2023, arXiv:2310.08915, eq. 3-6 and Algorithm 1.

    Deviations: a swap is made only if it lowers |e|, so a row ends after its last useful swap. After
    a pruner that updates values (SparseGPT) the swapped-in weights are 0, so put it after Wanda.
    """
    score = layer.source.abs() * x.norm
    keep = pattern.keep(score) if layer.mask is None else layer.mask
    effect = layer.source * x.mean  # what each weight adds to the mean output, [out, in]
    gain = effect / x.variance.clamp(min=1e-8)
    size = pattern.m if pattern.structured else layer.source.shape[1]
    keep = keep.clone()
    error = effect.masked_fill(keep, 0.0).sum(1)
    for _ in range(cycles):
        revived, pruned, change = best_swap(keep, effect, gain, score, error, size)
        better = (error.abs() > threshold) & ((error + change).abs() < error.abs())
        if not bool(better.any()):
            break
        rows = better.nonzero().squeeze(1)
        keep[rows, revived[rows]] = True
        keep[rows, pruned[rows]] = False
        error = torch.where(better, error + change, error)
    return layer.masked(keep)


def best_swap(
    keep: Tensor, effect: Tensor, gain: Tensor, score: Tensor, error: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """For each row the weight to revive, the one to prune in its group of `size`, and the change of the error.

    Returns:
        Column to revive and column to prune, int64 [out], and the change, [out]; NaN where there is no swap.
    """
    rows = len(keep)
    sign = error.sign().unsqueeze(1)
    candidate = score.masked_fill(~keep | (sign * effect > 0), torch.inf)  # pruning it moves e towards 0
    cheapest, place = candidate.reshape(rows, -1, size).min(-1)  # [out, groups]
    possible = cheapest.isfinite().repeat_interleave(size, dim=1)
    wanted = (sign * gain).masked_fill(keep | ~possible, -torch.inf)
    best, revived = wanted.max(1)
    group = revived // size
    pruned = group * size + place.gather(1, group.unsqueeze(1)).squeeze(1)
    index = torch.arange(rows, device=keep.device)
    change = effect[index, pruned] - effect[index, revived]
    return revived, pruned, change.masked_fill(~best.isfinite(), torch.nan)
