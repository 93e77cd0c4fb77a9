"""What methods work on: immutable values, one for each linear and one for each group of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sparsekit.branch import Branch
from sparsekit.errors import MethodError
from sparsekit.quant import QuantizedWeight


@dataclass(frozen=True, slots=True, eq=False)
class LinearState:
    """One linear layer on its way through a recipe.

    Attributes:
        name: Full module path, for messages.
        source: float32 [out, in], the values before masking. A pruner that only chooses a mask
            leaves the dense values here, so that a later GPTQ can repair what pruning lost.
        mask: bool [out, in], True = kept; None while the layer is dense. Never changes once a
            quantizer has run.
        quantized: The integers, once a quantizer has run.
        notes: What went out of the ordinary (a numerics rung that was needed, a skipped search).
        dense: float32 [out, in], what the layer was before any step pruned it (after a training step:
            what training left). Only there for methods registered with `dense=True`; never stored.
        branch: A low-rank branch beside the weight. It stays dense and is no part of `weight`.
    """

    name: str
    source: Tensor
    mask: Tensor | None = None
    quantized: QuantizedWeight | None = None
    notes: tuple[str, ...] = ()
    dense: Tensor | None = None
    branch: Branch | None = None

    @property
    def weight(self) -> Tensor:
        """The float32 values the layer multiplies with: dequantized, or masked, or plain."""
        if self.quantized is not None:
            return self.quantized.dequantize()
        return self.source if self.mask is None else self.source.masked_fill(~self.mask, 0.0)

    @property
    def effective(self) -> Tensor:
        """The weight and what the branch adds to it, float32 [out, in]; dense, to measure errors with."""
        return self.weight if self.branch is None else self.weight + self.branch.matrix

    def masked(self, mask: Tensor) -> LinearState:
        """Choose the kept entries; values stay (bool [out, in])."""
        if mask.dtype != torch.bool or mask.shape != self.source.shape:
            raise MethodError(
                f"a mask must be bool {list(self.source.shape)}, got {mask.dtype} {list(mask.shape)}", layer=self.name
            )
        return replace(self, mask=mask)

    def updated(self, weight: Tensor, mask: Tensor | None = None) -> LinearState:
        """Replace the values, and the mask when one is given; pruned entries become zero."""
        state = replace(self, source=weight.float())
        state = state if mask is None else state.masked(mask)
        return replace(state, source=state.weight)

    def with_quantized(self, quantized: QuantizedWeight) -> LinearState:
        """Attach the integers; `source` becomes what they stand for."""
        if not isinstance(quantized, QuantizedWeight):
            told = type(quantized).__name__
            raise MethodError(f"with_quantized takes a QuantizedWeight, got a {told}", layer=self.name)
        return replace(self, source=quantized.dequantize(), quantized=quantized)

    def with_branch(self, branch: Branch) -> LinearState:
        """Attach a low-rank branch; weight, mask and integers stay.

        Raises:
            MethodError: There is one already.
        """
        if self.branch is not None:
            raise MethodError("it has a low-rank branch already; keep one step that adds them", layer=self.name)
        return replace(self, branch=branch)

    def noted(self, *notes: str) -> LinearState:
        """Add remarks for the report."""
        return replace(self, notes=(*self.notes, *notes))


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Linears fed by the same tensor.

    The unit of statistics (one Gram matrix for q, k and v), of AWQ's scale search and of GPTQ's
    true-sequential order.

    Attributes:
        linears: By full name, in the order the block calls them.
        tie: How the scale of the group's inputs must be tied to be absorbed by the operation that
            produces them: maps a free vector [free] to the input channels [in] (identity, or
            repetition of heads under GQA). None when nothing can absorb a scale; `why` says why.
        untie: Maps a statistic of the input channels [in] to the free vector [free] (mean of the
            tied channels).
        why: The reason `tie` is None.
        input_scale: [in], set by `rescaled`: the producer's outputs are to be divided by it.
    """

    linears: Mapping[str, LinearState]
    tie: Callable[[Tensor], Tensor] | None = None
    untie: Callable[[Tensor], Tensor] | None = None
    why: str = ""
    input_scale: Tensor | None = field(default=None)

    def with_linears(self, linears: Mapping[str, LinearState]) -> Group:
        """The same group with new linear states."""
        return replace(self, linears=dict(linears))

    def rescaled(self, scale: Tensor) -> Group:
        """Multiply every consumer's input columns by `scale` [in]; the producer is divided by it.

        The block computes the same function. The driver folds the division into the producer.
        """
        if self.tie is None:
            raise MethodError(f"the input of this group cannot be rescaled: {self.why}", layer=", ".join(self.linears))
        linears = {
            name: replace(
                state,
                source=state.source * scale,
                branch=None if state.branch is None else state.branch.rescaled(scale),
            )
            for name, state in self.linears.items()
        }
        total = scale if self.input_scale is None else self.input_scale * scale
        return replace(self, linears=linears, input_scale=total)
