"""The proof that travels with every step: patterns counted, masks kept, values finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekit.errors import MethodError, PatternError
from sparsekit.ladder import rungs_of
from sparsekit.pattern import Pattern
from sparsekit.registry import Kind
from sparsekit.state import LinearState
from sparsekit.stats import Gram, Statistic


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """What a step did to one linear.

    Attributes:
        name: Full module path.
        shape: [out, in].
        sparsity: Fraction of exact zeros in the values the layer computes with.
        pattern: The pattern it must hold, None when there is none.
        groups: Groups of M that were counted; 0 for an unstructured pattern.
        violations: Groups with more than N non-zeros, always 0: a step with one fails.
        error: Relative squared change the step made: of the layer's outputs on the calibration
            tokens when the method collected a Gram matrix, of its weights otherwise.
        error_of: "outputs" or "weights".
        bits: Bits of a code, None when the layer is not quantized.
        seconds: Time the method took on this layer.
        notes: What went out of the ordinary.
        branch_parameters: Of a low-rank branch beside the weight; `pattern` then ends in "+LR".
        rungs: Rungs of the numerics ladder that this step needed on it.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    pattern: str | None
    groups: int
    violations: int
    error: float
    error_of: str
    bits: int | None
    seconds: float
    notes: tuple[str, ...]
    rungs: tuple[str, ...] = ()
    branch_parameters: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def as_json(records: Sequence[LayerRecord], remarks: list[str]) -> list[dict[str, Any]]:
    """Records as JSON; the first takes the remarks about the whole block, which are cleared."""
    found = [record.as_dict() for record in records]
    if found and remarks:
        found[0]["notes"] = [*found[0]["notes"], *remarks]
        remarks.clear()
    return found


def verified(
    before: LinearState,
    after: LinearState,
    *,
    kind: Kind,
    pattern: Pattern | None,
    integers: bool = False,
    statistic: Statistic | None = None,
    input_scale: Tensor | None = None,
    seconds: float = 0.0,
) -> LayerRecord:
    """Check what a method returned for one linear and describe it.

    Args:
        before: The state the method was given.
        after: The state it returned.
        kind: Of the method; a quantizer may not touch the mask and must return integers.
        pattern: What the layer must hold from now on.
        integers: The method, a trainer, must return integers.
        statistic: The calibration statistic, for the output error.
        input_scale: [in], when the method rescaled the inputs (AWQ): `after` holds values times it.
        seconds: Time the method took.

    Raises:
        MethodError: The shape changed, values are not finite, or a quantizer returned no integers.
        PatternError: A mask was changed by a quantizer, a pruned entry is not zero, or a group
            holds more than N non-zeros.
    """
    weight = after.weight
    if weight.shape != before.source.shape:
        raise MethodError(f"the method changed the shape to {list(weight.shape)}", layer=before.name)
    if not torch.isfinite(weight).all():
        raise MethodError("the method returned values that are not finite", layer=before.name)
    if kind == "quantize":
        _check_quantized(before, after)
    elif integers and after.quantized is None:
        raise MethodError("a method that trains integers returned none", layer=before.name)
    _check_branch(before, after)
    violations = _violations(before, after, weight, pattern)
    error, error_of = relative_error(
        before.effective, weight if after.branch is None else after.effective, statistic, input_scale
    )
    return LayerRecord(
        name=before.name,
        shape=(weight.shape[0], weight.shape[1]),
        sparsity=float((weight == 0).float().mean()),
        pattern=labelled(pattern, after),
        groups=pattern.groups(weight) if pattern else 0,
        violations=violations,
        error=error,
        error_of=error_of,
        bits=after.quantized.bits if after.quantized else None,
        seconds=seconds,
        notes=after.notes,
        rungs=rungs_of(after.notes[len(before.notes) :]),
        branch_parameters=0 if after.branch is None else after.branch.parameters,
    )


def labelled(pattern: Pattern | None, state: LinearState) -> str | None:
    """`2:4`, or `2:4+LR` for a layer that computes more than its sparse weight."""
    if state.branch is None:
        return str(pattern) if pattern else None
    return f"{pattern}+LR" if pattern else "LR"


def _check_branch(before: LinearState, after: LinearState) -> None:
    if after.branch is None:
        if before.branch is not None:
            message = "the method dropped the low-rank branch; folded into the weight it would make it dense"
            raise MethodError(message, layer=before.name)
    elif not all(bool(torch.isfinite(value).all()) for _, value in after.branch.tensors()):
        raise MethodError("the method returned a low-rank branch that is not finite", layer=before.name)


def _check_quantized(before: LinearState, after: LinearState) -> None:
    if after.quantized is None:
        raise MethodError("a quantizer returned no integers; use layer.with_quantized(...)", layer=before.name)
    if before.mask is not None and (after.mask is None or not torch.equal(after.mask, before.mask)):
        raise PatternError("a quantizer changed the mask", layer=before.name)


def _violations(before: LinearState, after: LinearState, weight: Tensor, pattern: Pattern | None) -> int:
    if after.mask is not None:
        revived = int(((weight != 0) & ~after.mask).sum())
        if revived:
            raise PatternError(f"{revived} pruned weights are not zero", layer=before.name)
        if bool((torch.signbit(weight) & ~after.mask).any()):
            raise PatternError("pruned weights are stored as -0.0", layer=before.name)
    if pattern is None:
        return 0
    violations = pattern.violations(weight)
    if violations:
        groups = pattern.groups(weight)
        raise PatternError(f"{violations} of {groups} groups break the {pattern} pattern", layer=before.name)
    return violations


def relative_error(
    before: Tensor, after: Tensor, statistic: Statistic | None = None, input_scale: Tensor | None = None
) -> tuple[float, str]:
    """Relative squared change of a layer's outputs, or of its weights without a Gram matrix.

    Args:
        before: [out, in] values before.
        after: [out, in] values after, times `input_scale` [in] if there is one.
    Returns:
        tr(D H Dᵀ) / tr(W H Wᵀ) with D = W - Q and "outputs", or |D|² / |W|² and "weights".
    """
    if input_scale is not None:
        after = after / input_scale
    change = before - after
    if isinstance(statistic, Gram):
        base = statistic.energy(before)
        return float(statistic.energy(change) / base.clamp(min=1e-30)), "outputs"
    return float(change.square().sum() / before.square().sum().clamp(min=1e-30)), "weights"
