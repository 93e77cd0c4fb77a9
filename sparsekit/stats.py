"""Calibration statistics: mergeable accumulators over tokens, one for each group of linears."""

from __future__ import annotations

from typing import Protocol, Self

import torch
from torch import Tensor

from sparsekit.errors import PluginError
from sparsekit.pluginfile import named_failures
from sparsekit.quadratic import energy, mirror_
from sparsekit.sweep.panels import root_in_panels
from sparsekit.sweep.root import Root, reversed_factor, root_in_place

CORE_TOKENS = 128  # tokens that tensor cores add up without rounding losses that show (kernels/products.py)
PRODUCT_BYTES = 2**28  # of the partial sums that are held at a time
FEWEST = 128  # columns of a product whose other half is worth leaving out, on a CPU
DAMP_LADDER = (1, 3, 10, 30, 100)  # multiples of the asked damping, tried in this order


class Statistic(Protocol):
    """What a method may ask to know about a group's input.

    Attributes:
        tokens: How many tokens were added; 0 tells the driver that none reached the group.
    """

    tokens: int

    @classmethod
    def empty(cls, in_features: int, device: torch.device) -> Self:
        """No tokens seen yet."""
        ...

    def update(self, x: Tensor) -> None:
        """Add tokens, [tokens, in] in any float dtype."""
        ...

    def merge(self, other: Self) -> None:
        """Add what another accumulator saw; order matters up to rounding only."""
        ...


def begun(kind: type[Statistic], in_features: int, device: torch.device) -> Statistic:
    """A statistic without tokens; a plugin's that fails is named."""
    with named_failures(f"empty of statistic {kind.__name__}", kind):
        made = kind.empty(in_features, device)
        whole = isinstance(made, kind) and hasattr(made, "tokens")
    if not whole:
        raise PluginError(f"empty of statistic {kind.__name__} must return one, with its count of `tokens`, 0 at first")
    return made


def added(statistic: Statistic, x: Tensor) -> None:
    """Add tokens [tokens, in]; a plugin's statistic that fails is named."""
    with named_failures(f"update of statistic {type(statistic).__name__}", type(statistic)):
        statistic.update(x)


class InputNorm:
    """Sum of squares of every input channel, over tokens."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.tokens = 0
        self.squares = torch.zeros(in_features, dtype=torch.float32, device=device)

    @classmethod
    def empty(cls, in_features: int, device: torch.device) -> Self:
        """No tokens seen yet."""
        return cls(in_features, device)

    def update(self, x: Tensor) -> None:
        """Add tokens [tokens, in]."""
        if x.is_cuda:  # one pass over x, without a copy in float32
            self.squares += torch.linalg.vector_norm(x, 2, dim=0, dtype=torch.float32).square()
        else:
            self.squares += x.float().square().sum(0)
        self.tokens += x.shape[0]

    def merge(self, other: Self) -> None:
        """Add another accumulator's sums."""
        self.squares += other.squares.to(self.squares.device)
        self.tokens += other.tokens

    @property
    def norm(self) -> Tensor:
        """Root mean square of each channel, float32 [in]: ||x_j|| / sqrt(tokens)."""
        return (self.squares / max(self.tokens, 1)).sqrt()

    @property
    def broken(self) -> Tensor:
        """Channels whose sum is inf or NaN, bool [in]."""
        return ~torch.isfinite(self.squares)

    def without(self, inputs: Tensor) -> InputNorm:
        """The same with the channels bool [in] as large as the largest of the others."""
        other = InputNorm(len(self.squares), self.squares.device)
        other.tokens, other.squares = self.tokens, _levelled(self.squares, inputs)
        return other

    def diagonal(self) -> InputNorm:
        """The same, or every channel of size 1 when none is finite: a norm knows no correlations."""
        other = InputNorm(len(self.squares), self.squares.device)
        other.tokens = self.tokens
        other.squares = torch.full_like(self.squares, self.tokens) if bool(self.broken.all()) else self.squares.clone()
        return other


class Gram:
    """Sum of x xᵀ over tokens, and what is derived from it.

    The raw sum is kept in float32 and divided once: the running mean of the public references
    loses accuracy (llm-compressor PR 2333). bfloat16 and float16 products are exact in float32,
    so on CUDA the operands stay in their own dtype.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.tokens = 0
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self._upper = False  # only the upper triangle of the sum is up to date
        self.absolute = torch.zeros(in_features, dtype=torch.float32, device=device)
        self.ladder: tuple[int, ...] = DAMP_LADDER  # multiples of the asked damping that may be used
        self.packed = False  # the root takes 4 bytes an entry while it is computed, and 2 later
        self._factors: dict[tuple[float, bytes], tuple[Tensor, float]] = {}
        self._roots: dict[tuple[float, bytes], tuple[Root, float]] = {}

    @classmethod
    def empty(cls, in_features: int, device: torch.device) -> Self:
        """No tokens seen yet."""
        return cls(in_features, device)

    def update(self, x: Tensor) -> None:
        """Add tokens [tokens, in]."""
        if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
            self._add_narrow(x.contiguous())
        else:
            self._add_wide(x.float())
        if x.is_cuda:
            self.absolute += torch.linalg.vector_norm(x, 1, dim=0, dtype=torch.float32)
        else:
            ones = torch.ones(len(x), device=x.device)
            self.absolute += x.float().abs().t() @ ones  # a product adds up faster than `sum`
        self.tokens += x.shape[0]

    def _add_narrow(self, x: Tensor) -> None:
        """Add tokens of 16 bits, a few at a time: a long sum in a tensor core comes out too small."""
        from sparsekit.kernels.oneshot import gram_kernel  # noqa: PLC0415 - the kernels know methods' values

        if kernel := gram_kernel("auto", x):
            kernel(x, self._sum)
            self._upper = True
            return
        size = CORE_TOKENS * max(1, PRODUCT_BYTES // self.sum.nbytes)
        for part in torch.split(x, size):
            whole = len(part) // CORE_TOKENS * CORE_TOKENS
            steps = part[:whole].view(-1, CORE_TOKENS, x.shape[1])
            self.sum += torch.bmm(steps.mT, steps, out_dtype=torch.float32).sum(0)
            if whole < len(part):
                self.sum += torch.mm(part[whole:].t(), part[whole:], out_dtype=torch.float32)

    def _add_wide(self, x: Tensor) -> None:
        """Add tokens in float32; of many inputs to the upper triangle, with some of what is below its diagonal."""
        width = max(FEWEST, len(self._sum) // 4)  # of a part: 5 of 8 products are left
        for start in range(0, x.shape[1], width):
            stop = start + width
            self._sum[:stop, start:stop].addmm_(x[:, :stop].t(), x[:, start:stop])
        self._upper |= width < x.shape[1]

    @property
    def sum(self) -> Tensor:
        """Σ x xᵀ, float32 [in, in]."""
        if self._upper:
            mirror_(self._sum)
            self._upper = False
        return self._sum

    @sum.setter
    def sum(self, value: Tensor) -> None:
        self._sum, self._upper = value, False

    def merge(self, other: Self) -> None:
        """Add another accumulator's sums."""
        self.sum += other.sum.to(self.sum.device)
        self.absolute += other.absolute.to(self.sum.device)
        self.tokens += other.tokens

    @property
    def matrix(self) -> Tensor:
        """Mean of x xᵀ, float32 [in, in]."""
        return self.sum / max(self.tokens, 1)

    @property
    def norm(self) -> Tensor:
        """Root mean square of each channel, float32 [in]."""
        return (self.sum.diagonal() / max(self.tokens, 1)).clamp(min=0).sqrt()

    @property
    def abs_mean(self) -> Tensor:
        """Mean of |x| of each channel, float32 [in]."""
        return self.absolute / max(self.tokens, 1)

    @property
    def dead(self) -> Tensor:
        """Channels that were zero on every token, bool [in]."""
        return self.sum.diagonal() == 0

    @property
    def broken(self) -> Tensor:
        """Channels whose mean square is inf or NaN, bool [in]; every entry that is not finite is in one's row."""
        return ~torch.isfinite(self.sum.diagonal())

    def _alike(self) -> Self:
        """Of as many tokens and with the same settings, its sums still 0."""
        other = type(self)(len(self.sum), self.sum.device)
        other.tokens, other.ladder, other.packed = self.tokens, self.ladder, self.packed
        return other

    def without(self, inputs: Tensor) -> Self:
        """The same with the channels bool [in] uncorrelated and as large as the largest of the others."""
        other = self._alike()
        other.sum = self.sum.masked_fill(inputs.unsqueeze(0) | inputs.unsqueeze(1), 0.0)
        other.sum.diagonal().copy_(_levelled(self.sum.diagonal(), inputs))
        other.absolute = _levelled(self.absolute, inputs)
        return other

    def diagonal(self) -> Self:
        """The same without its correlations; the unit matrix when no channel is finite."""
        other = self._alike()
        if bool(self.broken.all()):
            other.sum.fill_diagonal_(self.tokens)
            other.absolute.fill_(self.tokens)
        else:
            other.sum.diagonal().copy_(self.sum.diagonal().clamp(min=0))
            other.absolute = self.absolute.clone()
        return other

    def energy(self, weight: Tensor) -> Tensor:
        """tr(D H Dᵀ) of a weight or a change D [out, in], float32, 0-dim: the mean square of its outputs, summed."""
        return self.energies(weight)[0]

    def energies(self, *weights: Tensor) -> list[Tensor]:
        """`energy` of some weights or changes, with one look at H."""
        if not self.sum.is_cuda:
            return [((weight @ self.matrix) * weight).sum() for weight in weights]
        return [energy(weight, self.sum) / max(self.tokens, 1) for weight in weights]

    def inverse_factor(self, damp: float, order: Tensor | None = None) -> tuple[Tensor, float]:
        """Upper Cholesky factor U of the inverse of the damped Gram matrix, (H + damp·mean(diag H)·I)⁻¹ = UᵀU.

        Computed in float64 without forming the inverse: with P the reversal of rows and columns,
        U = P · inv(chol(P H P)) · P. Shared by the linears of a group, so it is computed once.

        Args:
            damp: Ridge as a fraction of the mean diagonal (unitless, >= 0).
            order: A permutation of the inputs, int64 [in]; the factor is that of H[order, order].
        Returns:
            U, float32 [in, in], and the damping that was needed: the asked one, or the first of
            the ladder 3x, 10x, 30x, 100x that makes the matrix positive definite.
        Raises:
            NumericsError: Activations are not finite, or no rung of the ladder factors.
        Source: Frantar et al. 2022, arXiv:2210.17323, Alg. 1; dead channels get a unit diagonal as
            in IST-DASLab/gptq.
        """
        key = (damp, _order_key(order))
        if key not in self._factors:
            lower, used = reversed_factor(self.sum, self.tokens, self.ladder, damp, order)
            eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
            self._factors[key] = inverse.flip(0, 1).float().contiguous(), used
        return self._factors[key]

    def root(self, damp: float, order: Tensor | None = None) -> tuple[Root, float]:
        """Upper root G of the damped Gram matrix, H + damp·mean(diag H)·I = G Gᵀ; U is its inverse.

        Arguments, damping and errors as in `inverse_factor`, which costs four times as much. Computed in
        float64, which on an H100 takes no longer than float32 (17 ms for 11008 inputs; the inverse would take
        46 ms more). It takes 12 bytes an entry besides the sum, and 4 where the roots are to be `packed`.
        """
        key = (damp, _order_key(order))
        if key not in self._roots:
            if self.packed:
                self._roots[key] = root_in_panels(self.sum, self.tokens, self.ladder, damp, order)
            else:
                matrix, used = root_in_place(self.sum, self.tokens, self.ladder, damp, order)
                self._roots[key] = Root(matrix), used
        return self._roots[key]


def _order_key(order: Tensor | None) -> bytes:
    return b"" if order is None else order.cpu().numpy().tobytes()


def _levelled(values: Tensor, inputs: Tensor) -> Tensor:
    """Values [in] with those of the chosen inputs replaced by the largest of the others."""
    largest = values.masked_fill(inputs, 0.0).max()
    return torch.where(inputs, largest, values)
