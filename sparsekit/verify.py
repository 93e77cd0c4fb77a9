"""The proof that travels with every step: patterns counted, masks kept, values finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsekit.errors import MethodError, NumericsError, PatternError
from sparsekit.ladder import rungs_of
from sparsekit.method import Kind
from sparsekit.pattern import Pattern
from sparsekit.quant import QuantizedWeight
from sparsekit.state import Group, LinearState
from sparsekit.stats import Gram, Statistic

CHANGED = {"quantize": "a quantizer changed the mask", "branch": "a low-rank branch came with another mask or weight"}


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


def same_group(result: object, given: Mapping[str, LinearState]) -> Group:
    """What a method of scope group returned.

    Raises:
        MethodError: It is no group, or one of other linears than those of `given`.
    """
    if not isinstance(result, Group):
        raise MethodError(f"the method returned {told_type(result)}, expected the Group with its new linears")
    if result.linears.keys() != given.keys():
        raise MethodError(f"the method returned the linears {', '.join(result.linears)}, not those it was given")
    return result


def told_type(value: object) -> str:
    """What somebody returned, short enough for a message."""
    return "None" if value is None else f"a {type(value).__name__}"


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
        kind: Of the method; a quantizer may not touch the mask and must return integers, one of kind `branch`
            may touch neither mask nor weight.
        pattern: What the layer must hold from now on.
        integers: The method, a trainer or a pruner, must return integers.
        statistic: The calibration statistic, for the output error.
        input_scale: [in], when the method rescaled the inputs (AWQ): `after` holds values times it.
        seconds: Time the method took.

    Raises:
        MethodError: The shape changed, values are not finite, or a quantizer returned no integers.
        PatternError: A mask was changed by a quantizer, a pruned entry is not zero, or a group
            holds more than N non-zeros.
    """
    return concluded([examined(before, after, kind, pattern, integers, statistic, input_scale, seconds)])[0]


@dataclass(frozen=True, slots=True, eq=False)
class Examined:
    """One linear's proof before anybody has looked at it: counts on the device, and what they are counts of.

    Attributes:
        counts: float64 [8] in the order of `record`'s checks, on the layer's device.
        base: 0-dim, what the last of them, the error, is relative to.
        proven: The record they belong to, as if nothing were wrong.
        groups_of: The pattern in words, for the message.
        kind: Of the method, likewise.
    """

    counts: Tensor
    base: Tensor
    proven: LayerRecord
    groups_of: str
    kind: Kind

    def record(self, counts: Sequence[float]) -> LayerRecord:
        """The record, once the counts are on the host; raises as `verified`."""
        layer = self.proven.name
        infinite, changed, branch, revived, negative, violations, sparsity, error = counts
        if infinite:
            raise NumericsError("the method returned values that are not finite", layer=layer)
        if changed:
            raise PatternError(CHANGED[self.kind], layer=layer)
        if branch:
            raise MethodError("the method returned a low-rank branch that is not finite", layer=layer)
        if revived:
            raise PatternError(f"{int(revived)} pruned weights are not zero", layer=layer)
        if negative:
            raise PatternError("pruned weights are stored as -0.0", layer=layer)
        if violations:
            told = f"{int(violations)} of {self.proven.groups} groups break the {self.groups_of} pattern"
            raise PatternError(told, layer=layer)
        return replace(self.proven, sparsity=sparsity, error=error)


def concluded(examinations: Sequence[Examined]) -> list[LayerRecord]:
    """The records of some linears of one device, which is waited for once.

    Raises:
        MethodError: As `verified`, for the first of them that breaks a promise.
        PatternError: Likewise.
    """
    if not examinations:
        return []
    counts = torch.stack([each.counts for each in examinations]).tolist()
    return [each.record(found) for each, found in zip(examinations, counts, strict=True)]


def examined(
    before: LinearState,
    after: LinearState,
    kind: Kind,
    pattern: Pattern | None,
    integers: bool,
    statistic: Statistic | None,
    input_scale: Tensor | None,
    seconds: float,
) -> Examined:
    """`verified` without waiting for the device; only what the host knows is raised here."""
    _check_form(before, after)
    weight = after.weight
    if kind == "quantize" and after.quantized is None:
        raise MethodError("a quantizer returned no integers; use layer.with_quantized(...)", layer=before.name)
    if integers and after.quantized is None:
        raise MethodError("a method that was asked for bits returned no integers", layer=before.name)
    if kind == "branch" and (after.branch is None or (after.quantized is None) is not (before.quantized is None)):
        raise MethodError("a method of kind branch returns layer.with_branch(...)", layer=before.name)
    if after.branch is None and before.branch is not None:
        message = "the method dropped the low-rank branch; folded into the weight it would make it dense"
        raise MethodError(message, layer=before.name)
    error, base, error_of = _relative_error(
        before.effective, weight if after.branch is None else after.effective, statistic, input_scale
    )
    none = weight.new_zeros(())
    mask, nonzero = after.mask, weight != 0
    counts = [
        (~torch.isfinite(weight)).any(),
        _changed(before, after, weight, kind) if kind in CHANGED else none,
        none if after.branch is None else (~torch.stack([v.isfinite().all() for _, v in after.branch.tensors()])).any(),
        none if mask is None else (nonzero & ~mask).sum(),
        none if mask is None else (torch.signbit(weight) & ~mask).any(),
        none if pattern is None else pattern.count_violations(nonzero),
        (~nonzero).float().mean(),
        error,
    ]
    proven = LayerRecord(
        name=before.name,
        shape=(weight.shape[0], weight.shape[1]),
        sparsity=0.0,
        pattern=labelled(pattern, after),
        groups=pattern.groups(weight) if pattern else 0,
        violations=0,
        error=0.0,
        error_of=error_of,
        bits=after.quantized.bits if after.quantized else None,
        seconds=seconds,
        notes=after.notes,
        rungs=rungs_of(after.notes[len(before.notes) :]),
        branch_parameters=0 if after.branch is None else after.branch.parameters,
    )
    return Examined(torch.stack([count.double() for count in counts]), base, proven, str(pattern), kind)


def of_rows(parts: Sequence[Examined]) -> Examined:
    """The proof of a linear out of those of all its rows, a few in each."""
    if len(parts) == 1:
        return parts[0]
    counts, records = torch.stack([part.counts for part in parts]), [part.proven for part in parts]
    rows = counts.new_tensor([record.shape[0] for record in records])
    bases = torch.stack([part.base for part in parts]).double()
    found = counts.sum(0)
    found[-2] = (counts[:, -2] * rows).sum() / rows.sum()
    found[-1] = (counts[:, -1] * bases).sum() / bases.sum().clamp(min=1e-30)
    shape = (sum(record.shape[0] for record in records), records[0].shape[1])
    groups, seconds = sum(record.groups for record in records), sum(record.seconds for record in records)
    whole = replace(records[0], shape=shape, groups=groups, seconds=seconds)
    return Examined(found, bases.sum(), whole, parts[0].groups_of, parts[0].kind)


def _check_form(before: LinearState, after: LinearState) -> None:
    """Whether a result is made of tensors as a state has them; what is in them is counted later."""
    if not isinstance(after, LinearState):
        raise MethodError(f"the method returned {told_type(after)}, expected a LinearState", layer=before.name)
    parts: dict[str, tuple[object, torch.dtype | None]] = {"values": (after.source, torch.float32)}
    if after.mask is not None:
        parts["a mask"] = (after.mask, torch.bool)
    if after.quantized is not None:
        parts["integers"] = (after.quantized.codes if isinstance(after.quantized, QuantizedWeight) else None, None)
    for what, (value, dtype) in parts.items():
        if not isinstance(value, Tensor):
            raise MethodError(f"the method returned {what} that are none: {told_type(value)}", layer=before.name)
        if value.shape != before.source.shape:
            raise MethodError(f"the method changed the shape: {what} of {list(value.shape)}", layer=before.name)
        if dtype is not None and value.dtype != dtype:
            raise MethodError(f"the method returned {what} in {value.dtype}, expected {dtype}", layer=before.name)
        if value.device != before.source.device:
            told = f"the method returned {what} on {value.device}, given was {before.source.device}"
            raise MethodError(told, layer=before.name)


def labelled(pattern: Pattern | None, state: LinearState) -> str | None:
    """`2:4`, or `2:4+LR` for a layer that computes more than its sparse weight."""
    if state.branch is None:
        return str(pattern) if pattern else None
    return f"{pattern}+LR" if pattern else "LR"


def _changed(before: LinearState, after: LinearState, weight: Tensor, kind: Kind) -> Tensor:
    """Whether what a method of this kind was given, and has to leave alone, is another one now."""
    moved = (weight != before.weight).any() if kind == "branch" else weight.new_zeros((), dtype=torch.bool)
    if before.mask is None:
        return moved
    if after.mask is None or after.mask.shape != before.mask.shape:
        return torch.ones_like(moved)
    return moved | (after.mask != before.mask).any()


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
    error, _, of = _relative_error(before, after, statistic, input_scale)
    return float(error), of


def _relative_error(
    before: Tensor, after: Tensor, statistic: Statistic | None, input_scale: Tensor | None
) -> tuple[Tensor, Tensor, str]:
    """The error, what it is relative to, and of what."""
    if input_scale is not None:
        after = after / input_scale
    change = before - after
    if isinstance(statistic, Gram):
        lost, base = statistic.energies(change, before)
        return lost / base.clamp(min=1e-30), base, "outputs"
    base = before.square().sum()
    return change.square().sum() / base.clamp(min=1e-30), base, "weights"
