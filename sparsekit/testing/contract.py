"""What every method promises, one function for each promise.

A function takes a `Subject`, returns when the promise holds, and raises a `ContractError` when it
does not; the message says what was seen and what to change. `sparsekit.testing` runs them all.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekit.checkpoint import BlockState, StepStore
from sparsekit.errors import ContractError, MethodError
from sparsekit.method import Method
from sparsekit.pattern import Pattern
from sparsekit.pluginfile import described
from sparsekit.registry import METHODS
from sparsekit.state import Group, LinearState
from sparsekit.testing.specimens import (
    COLUMNS,
    Given,
    arguments_of,
    linears_of,
    readable,
    refines,
    specimen,
    tensors_of,
)
from sparsekit.testing.statistics import check_statistic
from sparsekit.verify import verified

NEAR = 0.02  # how far a share of zeros may be from the one asked for: rows of 256 do not divide by everything
AGREEMENT = 0.01  # share of entries on which CPU and CUDA may choose differently: near ties


@dataclass(frozen=True, slots=True)
class Subject:
    """The method under test and its arguments."""

    method: Method
    arguments: Mapping[str, Any]

    @property
    def pattern(self) -> Pattern | None:
        """The pattern it is asked for."""
        key = self.method.accepts(Pattern)
        return self.arguments[key] if key else None

    @property
    def integers(self) -> bool:
        """Whether it must return some."""
        return self.method.quantizes(self.arguments)

    def apply(self, given: Given) -> dict[str, LinearState]:
        """Call the method as the driver does; its linears by name.

        Raises:
            ContractError: The method fails, or returns something else than it was given.
        """
        positional = (given.state,) if given.statistic is None else (given.state, given.statistic)
        try:
            with torch.inference_mode():
                result = self.method.function(*positional, **self.arguments)
        except Exception as error:  # a method may fail in any way; the promise is that it does not
            wide = next(iter(given.layers.values())).source.shape
            told = described(error, inspect.getfile(inspect.unwrap(self.method.function)))
            raise ContractError(f"it failed on a {list(wide)} weight: {told}") from error
        wanted = Group if self.method.scope == "group" else LinearState
        if not isinstance(result, wanted):
            ways = "layer.masked(mask), layer.updated(weight, mask) or layer.with_quantized(integers)"
            ways = "group.with_linears({...})" if wanted is Group else ways
            raise ContractError(f"it returned {type(result).__name__}, not {wanted.__name__}; end with return {ways}")
        return dict(linears_of(result))

    def width(self) -> int:
        """Inputs of the narrowest weight: one group of the pattern, of the quantizer, or 4."""
        size = self.arguments.get("group_size", 0)
        if size > 0:
            return int(size)
        return self.pattern.m if self.pattern is not None and self.pattern.structured else 4


def runs(subject: Subject) -> None:
    """It takes an ordinary weight and returns what it should."""
    subject.apply(specimen(subject.method))


def purity(subject: Subject) -> None:
    """The layer and the statistic it is given are not modified."""
    given = specimen(subject.method)
    before = {key: tensor.clone() for key, tensor in _inputs(given).items()}
    subject.apply(given)
    for key, tensor in _inputs(given).items():
        if key in before and not torch.equal(tensor, before[key]):
            raise ContractError(
                f"it changed its input: the {key} differs after the call. Work on a copy "
                "(weight = layer.source.clone()) and keep w[...] = and methods that end in _ away from inputs"
            )


def shapes(subject: Subject) -> None:
    """Every linear comes back under its name and with its shape."""
    given = specimen(subject.method)
    results = subject.apply(given)
    if set(results) != set(given.layers):
        raise ContractError(f"it was given the layers {sorted(given.layers)} and returned {sorted(results)}")
    for name, after in results.items():
        expected, got = list(given.layers[name].source.shape), list(after.weight.shape)
        if got != expected:
            raise ContractError(f"it turned a {expected} weight into {got}; [out, in] must stay, zeros are stored")


def dtype(subject: Subject) -> None:
    """Values are finite float32, masks bool, integers in range."""
    for after in subject.apply(specimen(subject.method)).values():
        if after.source.dtype != torch.float32:
            raise ContractError(f"it returned {after.source.dtype} values; end with .float(), methods work in float32")
        if not torch.isfinite(after.weight).all():
            raise ContractError("it returned inf or NaN on ordinary inputs; look for a division by zero or a log of 0")
        if after.mask is not None and after.mask.dtype != torch.bool:
            raise ContractError(f"its mask is {after.mask.dtype}; masks are torch.bool, True = kept")
        integers = after.quantized
        if integers is not None and int(integers.codes.max()) >= 2**integers.bits:
            raise ContractError(f"it returned the code {int(integers.codes.max())}, too large for {integers.bits} bits")


def pattern(subject: Subject) -> None:
    """A pruner delivers the pattern it is asked for; a quantizer delivers integers."""
    given = specimen(subject.method)
    for name, after in subject.apply(given).items():
        if subject.method.kind == "prune" and after.mask is None:
            raise ContractError("it returned no mask; use layer.masked(mask) or layer.updated(weight, mask)")
        as_the_driver(subject, given.layers[name], after, subject.pattern)
        wanted = subject.pattern.sparsity if subject.pattern else None
        share = _pruned(after)
        if wanted is not None and abs(share - wanted) > NEAR:
            told = f"{share:.3f} of the weights are zero, {subject.pattern} means {wanted:.3f}"
            raise ContractError(f"{told}; pattern.keep(score) chooses as many as it should")


def unstructured(subject: Subject) -> None:
    """A pruner that takes a pattern takes `sparsity: 0.5` too, or refuses it with a MethodError."""
    key = subject.method.accepts(Pattern)
    assert key is not None  # `applies`
    half = Subject(subject.method, {**subject.arguments, key: Pattern.unstructured(0.5)})
    try:
        results = half.apply(specimen(subject.method))
    except ContractError as error:
        if isinstance(error.__cause__, MethodError):
            return
        hint = "refuse what it cannot do: if not pattern.structured: raise MethodError(...)"
        raise ContractError(f"with sparsity 0.5 {error}; {hint}") from error
    for after in results.values():
        share = _pruned(after)
        if abs(share - 0.5) > NEAR:
            hint = "pattern.keep(score) knows both, N:M and a share of the weights"
            raise ContractError(f"asked for sparsity 0.5 it pruned {share:.3f}; {hint}")


def mask_kept(subject: Subject) -> None:
    """A mask that is there stays, and pruned entries stay exactly +0.0; also under a quantizer after it."""
    chooses = subject.method.kind == "prune" and not refines(subject.method)
    given = specimen(subject.method, masked=not chooses)
    results = subject.apply(given)
    if chooses and subject.integers:  # nothing may come after it
        return
    if chooses:
        quantize = Subject(METHODS.get("rtn"), arguments_of(METHODS.get("rtn"), {"group_size": -1}))
        for after in results.values():
            for rounded in quantize.apply(Given(after, None, given.dead)).values():
                as_the_driver(quantize, after, rounded, subject.pattern)
        return
    for name, after in results.items():
        before = given.layers[name]
        if after.mask is None or before.mask is None or not torch.equal(after.mask, before.mask):
            raise ContractError("it changed the mask of a pruned layer; keep layer.mask, and zero what it prunes")
        as_the_driver(subject, before, after, Pattern(2, 4))


def dead_inputs(subject: Subject) -> None:
    """Inputs that were 0 on every token do no harm."""
    _delivers(subject, specimen(subject.method))  # what fails without them is not their fault
    try:
        _delivers(subject, specimen(subject.method, dead=COLUMNS // 8))
    except ContractError as error:
        hint = "divide by x.norm.clamp(min=1e-8), and expect zero rows in a Gram matrix"
        raise ContractError(f"with 32 of 256 inputs always 0, {error}; {hint}") from error


def determinism(subject: Subject) -> None:
    """The same inputs give the same bits."""
    first, second = (subject.apply(specimen(subject.method)) for _ in range(2))
    for name, state in first.items():
        if not torch.equal(state.weight, second[name].weight):
            count = int((state.weight != second[name].weight).sum())
            raise ContractError(
                f"two calls differ in {count} weights; draw random numbers from "
                "torch.Generator().manual_seed(seed), with seed a parameter, and keep nothing between calls"
            )


def one_row(subject: Subject) -> None:
    """A weight with a single output works."""
    _delivers(subject, specimen(subject.method, rows=1))


def one_group(subject: Subject) -> None:
    """A weight with a single group of inputs works."""
    _delivers(subject, specimen(subject.method, columns=subject.width()))


def resume(subject: Subject) -> None:
    """What it returned is the same after it has been written to a step's directory and read back."""
    results = subject.apply(specimen(subject.method))
    with tempfile.TemporaryDirectory(prefix="sparsekit-check-") as directory:
        store = StepStore(Path(directory), torch.float32)
        store.commit_block(0, BlockState(results), [])
        block = store.block(0)
    assert block is not None  # committed a moment ago
    for name, state in results.items():
        back = block.linears[name]
        same = torch.equal(back.weight, state.weight) and _equal(back.mask, state.mask)
        if not same or not torch.equal(back.source, state.source):
            raise ContractError(
                "its result changes when it is written and read back, so a resumed run would differ; "
                "attach integers with layer.with_quantized(...), whose float16 scales are what is stored"
            )


def devices(subject: Subject) -> None:
    """CPU and CUDA agree up to rounding and near ties."""
    here = subject.apply(specimen(subject.method))
    there = subject.apply(specimen(subject.method, device=torch.device("cuda")))
    for name, state in here.items():
        other = there[name].weight
        if other.device.type != "cuda":
            raise ContractError("on CUDA it returned CPU tensors; create tensors with device=layer.source.device")
        scale = state.weight.abs().max()
        far = ((state.weight - other.cpu()).abs() > 1e-3 * scale).float().mean()
        if far > AGREEMENT:
            raise ContractError(f"CPU and CUDA differ in {float(far):.1%} of the weights")


def statistic(subject: Subject) -> None:
    """The statistic it reads counts tokens, adds up, merges, and leaves its input alone."""
    assert subject.method.stats is not None  # `applies`
    check_statistic(subject.method.stats)


def documented(subject: Subject) -> None:
    """The first line of its docstring says what it does."""
    if not subject.method.summary:
        raise ContractError("it has no docstring; its first line stands in the list of sparsekit methods")


def _inputs(given: Given) -> dict[str, Tensor]:
    found = {f"layer's {key}": tensor for key, tensor in tensors_of(given.state).items()}
    if given.statistic is not None:
        found |= {f"statistic's {key}": tensor for key, tensor in readable(given.statistic).items()}
    return found


def _delivers(subject: Subject, given: Given) -> None:
    """The results for some input pass what the driver checks."""
    for name, after in subject.apply(given).items():
        as_the_driver(subject, given.layers[name], after, subject.pattern)


def _pruned(after: LinearState) -> float:
    """Share of pruned weights; integers may be 0 without being pruned."""
    zero = after.weight == 0 if after.quantized is None or after.mask is None else ~after.mask
    return float(zero.float().mean())


def as_the_driver(subject: Subject, before: LinearState, after: LinearState, wanted: Pattern | None) -> None:
    """What the driver checks after every call; AWQ's scale is not undone, so the error is not looked at."""
    kept = subject.method.kind in ("quantize", "branch")  # these leave masks alone
    plain = before if kept else replace(before, mask=None)
    try:
        verified(plain, after, kind=subject.method.kind, pattern=wanted, integers=subject.integers)
    except MethodError as error:
        raise ContractError(str(error)) from error


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)
