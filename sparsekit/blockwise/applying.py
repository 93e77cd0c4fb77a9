"""A step's method on one state: with which arguments, in which pieces, and what is done when its arithmetic fails."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from sparsekit.blockwise.stacking import at_once, joined, pieces, plain, sent
from sparsekit.checkpoint import HOST
from sparsekit.errors import MethodError, PluginError
from sparsekit.ladder import UNREACHED, Ladder
from sparsekit.method import Method
from sparsekit.pattern import Pattern
from sparsekit.state import Group, LinearState
from sparsekit.stats import Statistic, added
from sparsekit.verify import Examined, LayerRecord, examined, of_rows, same_group


@dataclass(slots=True)
class Applying:
    """A method, and what it is called with.

    Attributes:
        method: The method.
        arguments: Of the step.
        device: Where it works.
        patterns: The pattern each linear must hold after the step.
        allotted: The pattern a layer gets in place of the argument, by an allocation method.
        overrides: Arguments of single layers in place of the step's; one member decides for its group.
        ladder: What may be done where arithmetic fails.
        mended: What was done to the statistic of a layer, which its result is noted with.
    """

    method: Method
    arguments: Mapping[str, Any]
    device: torch.device
    patterns: Mapping[str, Pattern]
    allotted: Mapping[str, Pattern]
    overrides: Mapping[str, Mapping[str, Any]]
    ladder: Ladder
    mended: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def linears(
        self, states: Sequence[LinearState], statistic: Statistic | None
    ) -> Iterator[tuple[LinearState, Examined]]:
        """Every linear's result, on the device, and its proof; solved as one where that can be done."""
        given = [sent(state, self.device) for state in states]
        noted = [self._mended(state) for state in given]
        together = at_once(self.method, noted, [self._arguments(state) for state in noted], statistic)
        if together is not None:
            for before, (after, seconds) in zip(given, together, strict=True):
                yield after, self.proof(before, after, statistic, seconds)
            return
        for before in given:
            yield self._linear(before, statistic)

    def in_turn(
        self, states: Sequence[LinearState], statistic: Statistic | None, weights: int | None
    ) -> Iterator[tuple[LinearState, Examined]]:
        """Every linear's result, on the host, and its proof; so many weights are on the device at a time.

        Args:
            states: On the host.
            statistic: Of their input.
            weights: At a time, where the method works by rows; None for all of a linear.
        """
        for state in states:
            size = weights if statistic is not None and plain(state) and self._by_rows(state) else None
            afters, proofs = list[LinearState](), list[Examined]()
            for part in pieces(state, size):
                after, proof = self._linear(sent(part, self.device), statistic)
                afters.append(sent(after, HOST))
                proofs.append(proof)
                del after
            yield joined(state, afters), of_rows(proofs)

    def group(self, given: Group, statistic: Statistic) -> tuple[Group, float]:
        """The method on a group, and its seconds."""
        start = time.perf_counter()
        with naming(", ".join(given.linears)):
            result = same_group(self._called(given, statistic), given.linears)
        return result, time.perf_counter() - start

    def proof(
        self, before: LinearState, after: LinearState, statistic: Statistic | None, seconds: float, scale: Any = None
    ) -> Examined:
        """What a result is counted to be."""
        pattern = self.patterns.get(before.name)
        integers = self.method.quantizes(self.arguments)
        return examined(before, after, self.method.kind, pattern, integers, statistic, scale, seconds)

    def _linear(self, given: LinearState, statistic: Statistic | None) -> tuple[LinearState, Examined]:
        """The method on one linear or some rows of it."""
        start = time.perf_counter()
        with naming(given.name):
            after: LinearState = self._called(given, statistic)
        return after, self.proof(given, after, statistic, time.perf_counter() - start)

    def _by_rows(self, state: LinearState) -> bool:
        return self.method.by_rows(self._arguments(state))

    def _arguments(self, given: LinearState | Group) -> Mapping[str, Any]:
        """The arguments of the method for a layer or a group."""
        arguments = self.arguments
        if isinstance(given, LinearState) and given.name in self.allotted:
            arguments = {**arguments, "pattern": self.allotted[given.name]}
        for name in [given.name] if isinstance(given, LinearState) else given.linears:
            arguments = {**arguments, **self.overrides.get(name, {})}
        return arguments

    def _called(self, given: LinearState | Group, statistic: Statistic | None) -> Any:
        arguments = self._arguments(given)
        if statistic is None:
            return self.method.guarded(given, **arguments)
        if statistic.tokens == 0:  # an expert the router never chose
            width = next(iter(given.linears.values())) if isinstance(given, Group) else given
            added(statistic, torch.eye(width.source.shape[1], device=self.device))
            given = _noted(given, UNREACHED)
        if isinstance(given, Group):
            given = given.with_linears({n: self._mended(s) for n, s in given.linears.items()})
        else:
            given = self._mended(given)
        call = partial(self.method.guarded, **arguments)
        return self.ladder.apply(call, given, partial(_noted, given), statistic)

    def _mended(self, state: LinearState) -> LinearState:
        """The state with the notes of its statistic."""
        return state.noted(*self.mended.get(state.name, ()))


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Give an error of a method, which knows no names, the layer's name."""
    try:
        yield
    except MethodError as error:
        if error.layer is None:
            raise type(error)(str(error), layer=layer) from error
        raise
    except PluginError as error:
        raise PluginError(f"{layer}: {error}") from error


def _noted(given: LinearState | Group, note: str) -> LinearState | Group:
    if isinstance(given, Group):
        return given.with_linears({name: state.noted(note) for name, state in given.linears.items()})
    return given.noted(note)


def as_json(records: Sequence[LayerRecord], remarks: list[str]) -> list[dict[str, Any]]:
    """Records as JSON; the first takes the remarks about the whole block, which are cleared."""
    found = [record.as_dict() for record in records]
    if found and remarks:
        found[0]["notes"] = [*found[0]["notes"], *remarks]
        remarks.clear()
    return found
