"""The activations of two models side by side: the one being compressed, and the one before the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparsekit.blockwise.activations import Activations, home
from sparsekit.blockwise.holding import HOLDINGS, Holding
from sparsekit.crossgram import Paired
from sparsekit.errors import MethodError
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
    """

    before: Activations | None = None
    seen: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def begin(cls, view: ModelView, tokens: Tensor, holding: Holding = HOLDINGS["auto"]) -> PairedActivations:
        """Embed the calibration windows, int [samples, seq_len]."""
        first, second = (Activations.begin(view, tokens, holding) for _ in range(2))
        return cls(view, first.hidden, first.calls, first.micro_batch, tokens, holding=holding, before=second)

    def look(self, index: int, *, keep: bool) -> None:
        """Advance the model before the step through its own block, which is resident.

        Args:
            index: Of the block.
            keep: Remember what reaches its linears, for `collect`.
        """
        assert self.before is not None
        self.seen.clear()
        handles = []
        if keep:
            linears = self.view.linears(index)
            groups = self.view.groups(index, *self.before.sample(index))
            handles = [linears[g[0]].register_forward_pre_hook(self._recorder(g[0])) for g in groups]
        try:
            self.before.advance(index)
        finally:
            for handle in handles:
                handle.remove()
        self.remarks += self.before.remarks
        self.before.remarks.clear()

    def _recorder(self, name: str) -> Hook:
        def record(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            assert self.before is not None
            (x,), part = arguments, self.before.entered
            samples, length = self.hidden.shape[:2]
            if x.shape[:-1] != (part.stop - part.start, length):
                told = "not every token reaches it, so the two models cannot be compared token by token"
                raise MethodError(told, layer=name)
            if name not in self.seen:
                shape = (samples, length, x.shape[-1])
                self.seen[name] = torch.empty(shape, dtype=x.dtype, **home(shape, x, self.holding))
            self.seen[name][part] = x

        return record

    def feeder(self, name: str, statistic: Statistic, *, finite: bool) -> Hook:
        """Adds pairs of tokens to a statistic."""

        def feed(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            assert isinstance(statistic, Paired)
            (x,) = arguments
            now = x.detach().reshape(-1, x.shape[-1])
            then = self.seen[name][self.entered].to(x.device).reshape(now.shape)
            if finite:
                usable = torch.isfinite(now).all(-1) & torch.isfinite(then).all(-1)
                now, then = now[usable], then[usable]
            with named_failures(f"pair of statistic {type(statistic).__name__}", type(statistic)):
                statistic.pair(then, now)

        return feed

    def advance_settling(
        self,
        index: int,
        groups: Sequence[Sequence[str]],
        kind: type[Statistic],
        settle: Callable[[int, Statistic], None],
    ) -> bool:
        """Never: which windows wait is not known there. The driver goes group by group."""
        return False
