"""The block-sequential driver: calibrate, compress, verify, commit and replay one block after another.

The device holds one block, its statistics and a micro-batch. A committed block is loaded and
replayed forward-only, so a killed walk continues where it stopped, bit-identically on CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from sparsekit.blockwise.activations import Activations
from sparsekit.blockwise.applying import Applying, as_json, naming
from sparsekit.blockwise.holding import HOLDINGS, Holding
from sparsekit.blockwise.onepass import CalledAgain
from sparsekit.blockwise.pairing import PairedActivations
from sparsekit.blockwise.stacking import placed, sent
from sparsekit.blockwise.streaming import Behind
from sparsekit.checkpoint import HOST, BlockState, StepStore
from sparsekit.crossgram import Owed, Paired
from sparsekit.errors import MethodError
from sparsekit.ladder import Ladder
from sparsekit.method import Method
from sparsekit.models.groups import Producer
from sparsekit.models.view import ModelView
from sparsekit.pattern import Pattern
from sparsekit.pluginfile import named_failures
from sparsekit.state import Group
from sparsekit.stats import Gram, Statistic
from sparsekit.verify import Examined, LayerRecord, concluded


@dataclass(slots=True)
class Walk:
    """One step of scope linear or group, over all blocks.

    Attributes:
        view: The model; its blocks are empty before and after.
        method: What to apply, with the arguments in `arguments`.
        selected: Full names of the linears the step is meant for.
        patterns: The pattern each linear must hold after the step.
        before: State of a block before the step, on the host or the device.
        store: Where finished blocks are committed.
        tokens: Calibration windows [samples, seq_len], None for a method without statistics.
        schedule: "block": all statistics come from the block as it was. "group": each group sees
            its predecessors already compressed (GPTQ's true-sequential order).
        progress: Called with (blocks done, blocks in all).
        reference: A block before anything pruned it, for a method that asks for dense values.
        allotted: The pattern a layer gets in place of the argument, by an allocation method.
        overrides: Arguments of single layers in place of the step's; one member decides for its group.
        ladder: What may be done where arithmetic fails.
        holding: What is held on the device.
    """

    view: ModelView
    method: Method
    arguments: Mapping[str, Any]
    selected: frozenset[str]
    patterns: Mapping[str, Pattern]
    before: Callable[[int], BlockState]
    store: StepStore
    tokens: Tensor | None
    schedule: str
    progress: Callable[[int, int], None]
    reference: Callable[[int], BlockState] | None = None
    allotted: Mapping[str, Pattern] = field(default_factory=dict)
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ladder: Ladder = field(default_factory=Ladder)
    holding: Holding = HOLDINGS["auto"]
    _applying: Applying = field(init=False)
    _examined: list[Examined] = field(default_factory=list)
    _records: list[LayerRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        """What is known of the method's calls goes where they are made."""
        self._applying = Applying(
            self.method, self.arguments, self.view.device, self.patterns, self.allotted, self.overrides, self.ladder
        )

    def run(self) -> None:
        """Walk all blocks; blocks committed earlier are only replayed.

        Raises:
            MethodError: A method failed on a layer, which the message names.
            PatternError: A layer does not hold the pattern it promised.
        """
        total = len(self.view.blocks)
        stream = None
        if self.method.stats is not None:
            if self.tokens is None:
                raise MethodError(f"{self.method.name} needs calibration data")
            kind = PairedActivations if issubclass(self.method.stats, Paired) else Activations
            stream = kind.begin(self.view, self.tokens, self.holding)
        with Behind(self.store) as behind:
            for index in range(total):
                stored = self.store.stored(index)
                self._look(index, stream, keep=stored is None)
                if stored is None:
                    block = self.compressed(index, self._given(index), stream)
                    after = behind.commit(index, block, as_json(self._records, stream.remarks if stream else []))
                    del block  # while the hidden states go through the block, it is there once
                else:
                    after = stored.on(self.view.device)
                if stream is not None and index + 1 < total:
                    with resident(self.view, index, after):
                        stream.advance(index)
                del after  # or it is held until the next block is done
                self.progress(index + 1, total)

    def _look(self, index: int, stream: Activations | None, *, keep: bool) -> None:
        """Show a stream of two models the block as it was: what the method's target is computed with."""
        if isinstance(stream, PairedActivations):
            source = self.reference if self.method.dense and self.reference is not None else self.before
            with resident(self.view, index, source(index)):
                stream.look(index, keep=keep, owed=issubclass(self._kind, Owed))

    def _given(self, index: int) -> BlockState:
        """A block before the step, its linears with their dense values if the method asks for them."""
        block = self.before(index)
        if self.method.dense:
            if self.reference is None:
                raise MethodError(f"{self.method.name} needs the dense weights")
            dense = self.reference(index).linears
            linears = {n: replace(state, dense=dense[n].source) for n, state in block.linears.items()}
            block = BlockState(linears, block.params)
        return block

    def compressed(self, index: int, block: BlockState, stream: Activations | None) -> BlockState:
        """A block after the step, on the device; the stream may have been taken through it."""
        self._examined.clear()
        try:
            return self._compressed(index, block, stream)
        finally:  # after an error too: a layer before may have led to it, and is then the one to name
            self._records = concluded(self._examined)

    def _compressed(self, index: int, block: BlockState, stream: Activations | None) -> BlockState:
        names = [name for name in block.linears if name in self.selected]
        if not names:
            return block
        if stream is None:
            return self._each(block, names, None)
        block = placed(block, self.view.device if self.holding.blocks else HOST)
        with resident(self.view, index, block):
            groups = self.view.groups(index, *stream.sample(index))
            if self.method.scope == "group":
                return self._groups_backwards(index, block, groups, stream)
            if self.schedule == "group":
                return self._groups_in_order(index, block, groups, stream)
            statistics = self._collected(index, groups, stream)
        for group in groups:  # what is known of a group, and its factor, are held until it is done
            block = self._each(block, [name for name in group if name in self.selected], statistics.pop(0))
        return block

    @property
    def _kind(self) -> type[Statistic]:
        assert self.method.stats is not None  # only called with calibration
        return self.method.stats

    def _collected(self, index: int, groups: Sequence[Sequence[str]], stream: Activations) -> list[Statistic]:
        """One statistic for each group, finite by itself or with the help of the ladder."""
        return [
            self._finite(group, statistic, lambda g=group: stream.collect(index, [g], self._kind, finite=True)[0])  # type: ignore[misc]
            for group, statistic in zip(groups, stream.collect(index, groups, self._kind), strict=True)
        ]

    def _finite(self, group: Sequence[str], statistic: Statistic, again: Callable[[], Statistic]) -> Statistic:
        """A statistic as the ladder leaves it; what was done is noted on the group's layers later."""
        told = f"statistic {self._kind.__name__}"
        if isinstance(statistic, Gram):
            statistic.packed = self.holding.packed
        with naming(", ".join(group)), named_failures(told, self._kind):
            statistic, notes = self.ladder.mend(statistic, again)
        self._applying.mended |= dict.fromkeys(group, notes)
        return statistic

    def _groups_in_order(
        self, index: int, block: BlockState, groups: list[list[str]], stream: Activations
    ) -> BlockState:
        """Each group on what the groups before it have become: in one forward, or one for each group."""
        groups = [group for group in groups if not self.selected.isdisjoint(group)]
        result = block

        def settle(number: int, statistic: Statistic) -> None:
            nonlocal result
            chosen = [name for name in groups[number] if name in self.selected]
            result = self._each(result, chosen, statistic)
            if not self.holding.leaves:
                self.view.materialise(index, BlockState({name: result.linears[name] for name in chosen}))

        def mend_and_settle(number: int, found: Statistic) -> None:
            settle(number, self._finite(groups[number], found, _one_look))

        if stream.advance_settling(index, groups, self._kind, mend_and_settle):
            return result
        self._examined.clear()
        self.view.materialise(index, block)
        result = block
        for number, group in enumerate(groups):
            if number and self.holding.leaves:  # it left for the group before
                self.view.materialise(index, result)
            statistics = self._collected(index, [group], stream)
            if self.holding.leaves:
                self.view.release(index)
            settle(number, statistics.pop())  # nothing else holds it, so that it goes before the next one comes
        return result

    def _groups_backwards(
        self, index: int, block: BlockState, groups: list[list[str]], stream: Activations
    ) -> BlockState:
        """Last group first, so that a scale always folds into a producer that is not quantized yet."""
        producers = self.view.producers(index, groups, *stream.sample(index))
        statistics = self._collected(index, groups, stream)
        for names, producer, statistic in reversed(list(zip(groups, producers, statistics, strict=True))):
            chosen = [name for name in names if name in self.selected]
            if chosen:
                block = self._group(block, names, chosen, producer, statistic)
        return block

    def _each(self, block: BlockState, names: Sequence[str], statistic: Statistic | None) -> BlockState:
        """Apply a linear-scope method to the named linears of a block, which share an input."""
        linears, states = dict(block.linears), [block.linears[name] for name in names]
        if self.holding.blocks:
            results = self._applying.linears(states, statistic)
        else:
            results = self._applying.in_turn(states, statistic, self.holding.weights)
        for name, (after, proof) in zip(names, results, strict=True):
            linears[name] = after
            self._examined.append(proof)
        return BlockState(linears, block.params)

    def _group(
        self, block: BlockState, names: Sequence[str], chosen: Sequence[str], producer: Producer | str, stat: Statistic
    ) -> BlockState:
        """Apply a group-scope method, and fold the input scale it asks for into the producer."""
        given = {name: sent(block.linears[name], self.view.device) for name in chosen}
        why = producer if isinstance(producer, str) else ""
        if len(chosen) < len(names):
            why = f"{', '.join(sorted(set(names) - set(chosen)))} shares its input and is not part of the step"
        group = Group(given, why=why)
        if not why and isinstance(producer, Producer):
            group = replace(group, tie=producer.tie, untie=producer.untie)
        result, seconds = self._applying.group(group, stat)
        linears = {}
        for name, state in result.linears.items():
            self._examined.append(self._applying.proof(given[name], state, stat, seconds, result.input_scale))
            linears[name] = state if self.holding.blocks else sent(state, HOST)
        block = BlockState({**block.linears, **linears}, block.params)
        if result.input_scale is not None and isinstance(producer, Producer):
            block = producer.fold(block, result.input_scale.to(next(iter(linears.values())).source.device))
        return block


@contextmanager
def resident(view: ModelView, index: int, block: BlockState) -> Iterator[None]:
    """Hold one block on the device."""
    view.materialise(index, block)
    try:
        yield
    finally:
        view.release(index)


def _one_look() -> Statistic:
    """In the forward that stops at each group no token passes twice; the ladder needs one forward for each."""
    raise CalledAgain
