"""The activations of two models side by side: the one being compressed, and the one before the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparsekit.blockwise.activations import Activations, home
from sparsekit.blockwise.holding import HOLDINGS, Holding
from sparsekit.crossgram import Owed, Paired
from sparsekit.errors import MethodError
from sparsekit.models.groups import hooked
from sparsekit.models.view import ModelView
from sparsekit.pluginfile import named_failures
from sparsekit.stats import Statistic

Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]


@dataclass(slots=True)
class PairedActivations(Activations):
    """Hidden states of the compressed model that know those of the model before the step.

    A block is first run as it was before the step (`look`), and what reaches each group of linears
    is kept: windows · length · inputs of all groups, on the device or the host as `home` decides.
    Groups are then collected one by one; the forward that stops at each group is not used.

    Attributes:
        before: Hidden states of the model before the step.
        seen: What reached a group before the step, by its first linear, [samples, seq_len, in].
        streams: The stream before the step that the linear adds to, where a statistic wants to know what
            it lacks, [samples, seq_len, width].
        now: The same of the windows that are on their way, as they are now.
    """

    before: Activations | None = None
    seen: dict[str, Tensor] = field(default_factory=dict)
    streams: dict[str, Tensor] = field(default_factory=dict)
    now: dict[str, Tensor] = field(default_factory=dict)
    _doors: dict[str, nn.Module] = field(default_factory=dict)

    @classmethod
    def begin(cls, view: ModelView, tokens: Tensor, holding: Holding = HOLDINGS["auto"]) -> PairedActivations:
        """Embed the calibration windows, int [samples, seq_len]."""
        first, second = (Activations.begin(view, tokens, holding) for _ in range(2))
        return cls(view, first.hidden, first.calls, first.micro_batch, tokens, holding=holding, before=second)

    def look(self, index: int, *, keep: bool, owed: bool = False) -> None:
        """Advance the model before the step through its own block, which is resident.

        Args:
            index: Of the block.
            keep: Remember what reaches its linears, for `collect`.
            owed: And the streams they add to.
        """
        assert self.before is not None
        for known in (self.seen, self.streams, self._doors):
            known.clear()
        handles = []
        if keep:
            linears = self.view.linears(index)
            groups = self.view.groups(index, *self.before.sample(index))
            handles = [linears[g[0]].register_forward_pre_hook(self._recorder(g[0], self.seen)) for g in groups]
        if keep and owed:
            doors = self.view.doors(index, *self.before.sample(index))
            self._doors |= {g[0]: doors[g[0]] for g in groups if len(g) == 1 and g[0] in doors}
            if not self._doors:
                told = f"no linear of {self.view.blocks[index]} adds its output to the stream as it is"
                self.remarks.append(f"{told}: what the stream lacks is nobody's to make up for")
            for name, door in self._doors.items():
                handles.append(door.register_forward_pre_hook(self._recorder(name, self.streams)))
        with hooked(handles):
            self.before.advance(index)
        self.remarks += self.before.remarks
        self.before.remarks.clear()

    def _recorder(self, name: str, store: dict[str, Tensor]) -> Hook:
        def record(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            assert self.before is not None
            x, part = arguments[0], self.before.entered  # a block is called with more
            samples, length = self.hidden.shape[:2]
            if x.shape[:-1] != (part.stop - part.start, length):
                told = "not every token reaches it, so the two models cannot be compared token by token"
                raise MethodError(told, layer=name)
            if name not in store:
                shape = (samples, length, x.shape[-1])
                store[name] = torch.empty(shape, dtype=x.dtype, **home(shape, x, self.holding))
            store[name][part] = x

        return record

    def feeder(self, name: str, statistic: Statistic, *, finite: bool) -> Hook:
        """Adds pairs of tokens to a statistic."""

        def feed(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            assert isinstance(statistic, Paired)
            (x,) = arguments
            now = x.detach().reshape(-1, x.shape[-1])
            then = self.seen[name][self.entered].to(x.device).reshape(now.shape)
            lacking = self._lacking(name)
            if finite:
                usable = torch.isfinite(now).all(-1) & torch.isfinite(then).all(-1)
                usable = usable if lacking is None else usable & torch.isfinite(lacking).all(-1)
                now, then = now[usable], then[usable]
                lacking = None if lacking is None else lacking[usable]
            with named_failures(f"pair of statistic {type(statistic).__name__}", type(statistic)):
                statistic.pair(then, now)
                if lacking is not None and isinstance(statistic, Owed):
                    statistic.owe(lacking, now)

        return feed

    def _lacking(self, name: str) -> Tensor | None:
        """What the stream before a linear lacks now, float32 [tokens, width]; None if it adds to none."""
        if name not in self.streams:
            return None
        now = self.now.pop(name)
        before = self.streams[name][self.entered].to(now.device)
        return (before.float() - now.float()).reshape(-1, now.shape[-1])

    def _collect(
        self, index: int, groups: Sequence[Sequence[str]], kind: type[Statistic], finite: bool
    ) -> list[Statistic]:
        def passing(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda module, arguments: self.now.__setitem__(name, arguments[0].detach())

        wanted = [group[0] for group in groups if group[0] in self._doors]
        handles = [self._doors[name].register_forward_pre_hook(passing(name)) for name in wanted]
        try:
            with hooked(handles):
                return Activations._collect(self, index, groups, kind, finite)  # a dataclass with slots has no super()
        finally:
            self.now.clear()

    def advance_settling(
        self,
        index: int,
        groups: Sequence[Sequence[str]],
        kind: type[Statistic],
        settle: Callable[[int, Statistic], None],
    ) -> bool:
        """Never: which windows wait is not known there. The driver goes group by group."""
        return False
