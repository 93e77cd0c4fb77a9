"""The calibration tokens on their way through the blocks: one buffer, advanced in place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.blockwise.holding import HOLDINGS, Holding
from sparsekit.blockwise.onepass import CalledAgain, one_pass
from sparsekit.models.blocks import Call
from sparsekit.models.groups import hooked
from sparsekit.models.norms import replaced, single_kernel_norms
from sparsekit.models.view import ModelView
from sparsekit.shortage import half, twice
from sparsekit.stats import Statistic, added, begun

Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]
MICRO_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}  # enough to fill the unit, little enough for its memory
DEVICE_SHARE = 0.25  # of the free device memory that the activation buffer may take; beyond it stays on the host
QUICK = ("cuda",)  # where a norm may differ in the last bit; elsewhere results keep theirs
WAITING_SHARE = 0.5  # of the free device memory, or of the host's, that waiting micro-batches may take
WAITING_WIDTHS = 6  # block widths a token holds at most while it waits: residual, norm, query, key, value, output


@dataclass(slots=True)
class Activations:
    """Hidden states that enter a block, for all calibration windows.

    Attributes:
        view: The model.
        hidden: [samples, seq_len, width] in the compute dtype, on the device if it takes less than
            a quarter of its free memory, else on the host.
        calls: What else each block is called with, by micro-batch size.
        micro_batch: Windows a forward takes.
        block: Index of the block they enter.
        tokens: What they come from, int [samples, seq_len].
        remarks: What ran out of memory, for the report; whoever tells it takes it away.
        entered: The windows that entered a block last.
    """

    view: ModelView
    hidden: Tensor
    calls: dict[int, list[Call]]
    micro_batch: int
    tokens: Tensor
    block: int = 0
    remarks: list[str] = field(default_factory=list)
    holding: Holding = HOLDINGS["auto"]
    entered: slice = field(default_factory=lambda: slice(0, 0))

    @classmethod
    def begin(cls, view: ModelView, tokens: Tensor, holding: Holding = HOLDINGS["auto"]) -> Activations:
        """Embed the calibration windows, int [samples, seq_len]."""
        samples, length = tokens.shape
        most = MICRO_BATCH_TOKENS[view.device.type]
        micro_batch = max(1, min(samples, min(most, holding.tokens or most) // length))
        hidden: Tensor | None = None
        calls: dict[int, list[Call]] = {}
        for start in range(0, samples, micro_batch):
            part = tokens[start : start + micro_batch].long().to(view.device)
            entered, found = view.begin(part)
            calls.setdefault(len(part), found)
            if hidden is None:
                shape = (samples, length, entered.shape[-1])
                hidden = torch.empty(shape, dtype=entered.dtype, **home(shape, entered, holding))
            hidden[start : start + len(part)] = entered
        assert hidden is not None  # a text entry holds at least one window
        return cls(view, hidden, calls, micro_batch, tokens, holding=holding)

    def _batches(self) -> Iterator[slice]:
        for start in range(0, len(self.hidden), self.micro_batch):
            yield slice(start, min(start + self.micro_batch, len(self.hidden)))

    def enter(self, index: int, part: slice) -> tuple[Tensor, Call]:
        """Some windows entering a block, and what the block is called with besides."""
        self.entered = part
        size = part.stop - part.start
        if size not in self.calls:  # after a shortage of memory
            self.calls[size] = self.view.begin(self.tokens[:size].long().to(self.view.device))[1]
        return self.hidden[part].to(self.view.device, non_blocking=True), self.calls[size][index]

    def _smaller(self) -> None:
        """Go on with half of the windows in a forward."""
        before, self.micro_batch = self.micro_batch, half(self.micro_batch, "a forward through one block")
        told = f"the device ran out of memory with {before} windows in a forward; {self.micro_batch} from there on"
        self.remarks.append(told)

    def sample(self, index: int) -> tuple[Tensor, Call]:
        """The first micro-batch entering a block, to look at the block's structure."""
        return self.enter(index, next(self._batches()))

    def collect(
        self, index: int, groups: Sequence[Sequence[str]], kind: type[Statistic], *, finite: bool = False
    ) -> list[Statistic]:
        """Run the resident block on every window and accumulate one statistic for each group.

        Args:
            index: Of the block.
            groups: Names of linears that share an input.
            kind: Of the statistic.
            finite: Leave tokens out that have an inf or NaN among their activations.
        """
        return twice(lambda: self._collect(index, groups, kind, finite), self._smaller)

    def _collect(
        self, index: int, groups: Sequence[Sequence[str]], kind: type[Statistic], finite: bool
    ) -> list[Statistic]:
        linears = self.view.linears(index)
        statistics = [begun(kind, linears[group[0]].in_features, self.view.device) for group in groups]
        calls = _Calls(len(groups))
        handles = [
            linears[group[0]].register_forward_pre_hook(
                calls.counted(number, self.feeder(group[0], statistic, finite=finite))
            )
            for number, (group, statistic) in enumerate(zip(groups, statistics, strict=True))
        ]
        with hooked(handles), self._quick(index):
            for part in self._batches():
                calls.begin()
                try:
                    self.view.run_block(index, *self.enter(index, part))
                except _Enough:
                    continue
                calls.ended()
        return statistics

    def feeder(self, name: str, statistic: Statistic, *, finite: bool) -> Hook:
        """A hook at the input of the group that begins with the linear `name`: adds its tokens to a statistic."""

        def feed(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            (x,) = arguments
            rows = x.detach().reshape(-1, x.shape[-1])
            rows = rows[torch.isfinite(rows).all(-1)] if finite else rows
            if len(rows):  # a statistic need not know what the largest of no tokens is
                added(statistic, rows)

        return feed

    def advance(self, index: int) -> None:
        """Replace the buffer by what the resident block makes of it, unless `advance_settling` has done so."""
        if self.block > index:
            return
        start, samples = 0, len(self.hidden)
        with self._quick(index):
            while start < samples:  # what is advanced already must not be once more

                def step(start: int = start) -> int:
                    part = slice(start, min(start + self.micro_batch, samples))
                    self.hidden[part] = self.view.run_block(index, *self.enter(index, part))
                    return part.stop

                start = twice(step, self._smaller)
        self.block = index + 1

    def advance_settling(
        self,
        index: int,
        groups: Sequence[Sequence[str]],
        kind: type[Statistic],
        settle: Callable[[int, Statistic], None],
    ) -> bool:
        """Advance through the resident block in one forward that stops at each group until it is settled.

        Args:
            index: The block.
            groups: Linears that share an input, in call order.
            kind: What to accumulate for each group.
            settle: Takes a group's index and statistic and changes the group's weights in place.
        Returns:
            False if that cannot be done, as what waits is not to be held or would not fit, or a linear is called
            again after its group was settled: the buffer is as it was, weights may have been changed.
        """
        if not self.holding.waits:
            return False
        doors = [self.view.linears(index)[group[0]] for group in groups]
        samples, length, width = self.hidden.shape
        widest = max(door.in_features for door in doors)
        waiting = samples * length * waiting_bytes(width, widest, self.hidden.element_size())
        if waiting > WAITING_SHARE * free_memory(self.view.device):
            return False
        statistics: dict[int, Statistic] = {}  # made when the first token comes, dropped when settled

        def feed(group: int, x: Tensor) -> None:
            if group not in statistics:
                statistics[group] = begun(kind, doors[group].in_features, self.view.device)
            self.feeder(groups[group][0], statistics[group], finite=False)(doors[group], (x,))

        def settle_and_drop(group: int) -> None:
            known = group in statistics  # not if no token reached it
            settle(group, statistics.pop(group) if known else begun(kind, doors[group].in_features, self.view.device))

        batches = list(self._batches())
        try:
            with self._quick(index):
                outputs = one_pass([partial(self._left, index, part) for part in batches], doors, feed, settle_and_drop)
        except CalledAgain:
            return False
        except torch.OutOfMemoryError:  # many micro-batches wait at once here; group by group takes less
            self._smaller()
            return False
        for part, output in zip(batches, outputs, strict=True):
            self.hidden[part] = output
        self.block = index + 1
        return True

    @contextmanager
    def _quick(self, index: int) -> Iterator[None]:
        """Norms of the resident block as one operation each, where passes over the states are what they cost."""
        block = self.view.module.get_submodule(self.view.blocks[index])
        with replaced(single_kernel_norms(block) if self.view.device.type in QUICK else []):
            yield

    def _left(self, index: int, part: slice) -> Tensor:
        """What the resident block makes of a micro-batch, where the buffer is."""
        return self.view.run_block(index, *self.enter(index, part)).to(self.hidden.device)


class _Enough(Exception):
    """What was to be collected of a forward is collected; the rest of it need not be run.

    It is not for a `contextmanager` to catch: since Python 3.12 one holds the frames that an exception came
    through, and with them the tensors of the forward, until garbage is collected.
    """


class _Calls:
    """How often a forward reaches each group.

    Once a whole forward has reached each of them once, later ones end when they have reached them all. Where
    some are reached more often, or not always, as experts are, forwards go on to the end.
    """

    def __init__(self, groups: int) -> None:
        self._now, self._once = [0] * groups, False

    def counted(self, number: int, feed: Hook) -> Hook:
        """A hook that counts a group's calls."""

        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            feed(module, arguments)
            self._now[number] += 1
            if self._once and all(self._now):
                raise _Enough

        return hook

    def begin(self) -> None:
        """A forward begins."""
        self._now = [0] * len(self._now)

    def ended(self) -> None:
        """It came to its end."""
        self._once = all(count == 1 for count in self._now)


def waiting_bytes(width: int, widest: int, element: int) -> int:
    """Bytes that a token holds at most while it waits for a group of `widest` inputs."""
    return (WAITING_WIDTHS * width + widest) * element


def home(shape: tuple[int, int, int], like: Tensor, holding: Holding) -> dict[str, Any]:
    """Where a buffer of that shape is kept; on the host it is page-locked, so that a device copies at full speed."""
    size = shape[0] * shape[1] * shape[2] * like.element_size()
    if like.device.type != "cuda" or on_device(size, like.device, holding):
        return {"device": like.device}
    return {"device": torch.device("cpu"), "pin_memory": True}


def on_device(size: int, device: torch.device, holding: Holding) -> bool:
    """Whether hidden states of that many bytes are kept on a CUDA device."""
    if holding.hidden is None:
        return size < DEVICE_SHARE * free_memory(device)
    return holding.hidden == "device"


def free_memory(device: torch.device) -> int:
    """Bytes of device memory that are free; of a host's memory all."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
