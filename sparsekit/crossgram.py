"""A Gram matrix that also knows what the inputs were before anything upstream was compressed."""

from __future__ import annotations

from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from sparsekit.errors import NumericsError
from sparsekit.stats import Gram


@runtime_checkable
class Paired(Protocol):
    """A statistic that compares a layer's inputs with those of the model as it was before the step.

    The walk over blocks then keeps the activations of both models, and calls `pair` in place of
    `update`. `update` alone means that the two do not differ.
    """

    def pair(self, dense: Tensor, x: Tensor) -> None:
        """Add tokens: [tokens, in] in the model before the step, and the same tokens as they are now."""
        ...


@runtime_checkable
class Owed(Paired, Protocol):
    """A statistic that also wants to know what the stream lacks to which a layer's outputs are added."""

    def owe(self, lacking: Tensor, x: Tensor) -> None:
        """Add tokens that `pair` has been given: [tokens, out] of the stream before minus now, [tokens, in] now."""
        ...


class CrossGram(Gram):
    """Sum of x̂ x̂ᵀ over tokens as in `Gram`, with x̂ the inputs of the compressed model, and of (x - x̂) x̂ᵀ.

    Attributes:
        drift: Sum of (x - x̂) x̂ᵀ, float32 [in, in], x the inputs of the model before the step. The
            difference is summed, and not x x̂ᵀ, as it is the small one: nothing cancels later.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self.drift = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)

    def pair(self, dense: Tensor, x: Tensor) -> None:
        """Add tokens, [tokens, in] both, in any float dtype."""
        self.update(x)
        now = x.float()
        self.drift.addmm_((dense.to(x.device).float() - now).t(), now)

    def merge(self, other: Self) -> None:
        """Add another accumulator's sums."""
        super().merge(other)
        self.drift += other.drift.to(self.drift.device)

    @property
    def broken(self) -> Tensor:
        """Channels with a sum that is inf or NaN, bool [in]."""
        infinite = ~torch.isfinite(self.drift)
        return super().broken | infinite.all(0) | infinite.all(1)

    def without(self, inputs: Tensor) -> Self:
        """The same with the channels bool [in] uncorrelated, as large as the largest of the others, and not moved."""
        other = super().without(inputs)
        other.drift = self.drift.masked_fill(inputs.unsqueeze(0) | inputs.unsqueeze(1), 0.0)
        return other

    def aimed(self, weight: Tensor, damp: float, share: float = 1.0) -> Tensor:
        """The weight that does for the inputs as they are now what `weight` did for those before the step.

        W + share · W D (H + damp·mean(diag H)·I)⁻¹ with D the mean of (x - x̂) x̂ᵀ: for share 1 the
        minimum of ||W x - V x̂||² + damp·mean(diag H)·||V - W||² over V.

        Args:
            weight: W, float32 [out, in].
            damp: Ridge as a fraction of the mean diagonal.
            share: How far to go, 0 to 1.
        Returns:
            V, float32 [out, in].
        Raises:
            NumericsError: H is not positive definite, or not finite.
        Source: Li et al. 2025, arXiv:2504.02692 (GPTAQ), asymmetric calibration; solved at once here.
        """
        return (weight.double() + share * self._solved(weight.double() @ self._mean(self.drift), damp)).float()

    def _mean(self, total: Tensor) -> Tensor:
        """A sum over tokens as their mean, float64."""
        return total.double() / max(self.tokens, 1)

    def _solved(self, moved: Tensor, damp: float) -> Tensor:
        """`moved` (H + damp·mean(diag H)·I)⁻¹, float64 [out, in]."""
        matrix = self.matrix.double()
        level = damp * matrix.diagonal().mean()
        matrix.diagonal().add_(level)
        matrix.diagonal()[self.dead] = 1.0
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if int(failed) or not bool(torch.isfinite(lower).all()):
            raise NumericsError(f"the Gram matrix is not positive definite with damping {damp:g}")
        return torch.cholesky_solve(moved.t(), lower).t()


class StreamGram(CrossGram):
    """A `CrossGram` that also knows what the stream lacks to which the layer's outputs are added.

    Attributes:
        owed: Sum of (r - r̂) x̂ᵀ, float32 [out, in], with r the stream before this layer in the model before
            the step and r̂ the same now; None where the layer adds to no stream.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self.owed: Tensor | None = None

    def owe(self, lacking: Tensor, x: Tensor) -> None:
        """Add tokens, [tokens, out] and [tokens, in]."""
        added = lacking.to(x.device).float().t() @ x.float()
        self.owed = added if self.owed is None else self.owed + added

    def merge(self, other: Self) -> None:
        """Add another accumulator's sums."""
        super().merge(other)
        if other.owed is not None:
            owed = other.owed.to(self.sum.device)
            self.owed = owed if self.owed is None else self.owed + owed

    @property
    def broken(self) -> Tensor:
        """Channels with a sum that is inf or NaN, bool [in]."""
        found = super().broken
        return found if self.owed is None else found | (~torch.isfinite(self.owed)).all(0)

    def without(self, inputs: Tensor) -> Self:
        """As a `CrossGram`; nothing is owed by the channels bool [in]."""
        other = super().without(inputs)
        other.owed = None if self.owed is None else self.owed.masked_fill(inputs.unsqueeze(0), 0.0)
        return other

    def aimed_at_stream(self, weight: Tensor, damp: float, share: float, owed: float) -> Tensor:
        """`aimed`, and a share of what the stream lacks added to the target: W x + owed · (r - r̂).

        Args:
            weight: W, float32 [out, in].
            damp: As in `aimed`.
            share: As in `aimed`.
            owed: How much of it, 0 to 1.
        Returns:
            V, float32 [out, in].
        Raises:
            NumericsError: As in `aimed`.
        """
        if self.owed is None or not owed:
            return self.aimed(weight, damp, share)
        moved = share * (weight.double() @ self._mean(self.drift)) + owed * self._mean(self.owed)
        return (weight.double() + self._solved(moved, damp)).float()
