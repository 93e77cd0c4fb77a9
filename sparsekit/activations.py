"""The calibration tokens on their way through the blocks: one buffer, advanced in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsekit.model import Call, ModelView
from sparsekit.stats import Statistic

MICRO_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}  # enough to fill the unit, little enough for its memory
DEVICE_SHARE = 0.25  # of the free device memory that the activation buffer may take; beyond it stays on the host


@dataclass(slots=True)
class Activations:
    """Hidden states that enter a block, for all calibration windows.

    Attributes:
        view: The model.
        hidden: [samples, seq_len, width] in the compute dtype, on the device if it takes less than
            a quarter of its free memory, else on the host.
        calls: What else each block is called with, by micro-batch size.
        micro_batch: Windows a forward takes.
    """

    view: ModelView
    hidden: Tensor
    calls: dict[int, list[Call]]
    micro_batch: int

    @classmethod
    def begin(cls, view: ModelView, tokens: Tensor) -> Activations:
        """Embed the calibration windows, int [samples, seq_len]."""
        samples, length = tokens.shape
        micro_batch = max(1, min(samples, MICRO_BATCH_TOKENS[view.device.type] // length))
        hidden: Tensor | None = None
        calls: dict[int, list[Call]] = {}
        for start in range(0, samples, micro_batch):
            part = tokens[start : start + micro_batch].long().to(view.device)
            entered, found = view.begin(part)
            calls.setdefault(len(part), found)
            if hidden is None:
                shape = (samples, length, entered.shape[-1])
                hidden = torch.empty(shape, dtype=entered.dtype, device=_home(shape, entered))
            hidden[start : start + len(part)] = entered
        assert hidden is not None  # a text entry holds at least one window
        return cls(view, hidden, calls, micro_batch)

    def _batches(self) -> Iterator[slice]:
        for start in range(0, len(self.hidden), self.micro_batch):
            yield slice(start, min(start + self.micro_batch, len(self.hidden)))

    def _enter(self, index: int, part: slice) -> tuple[Tensor, Call]:
        return self.hidden[part].to(self.view.device), self.calls[part.stop - part.start][index]

    def sample(self, index: int) -> tuple[Tensor, Call]:
        """The first micro-batch entering a block, to look at the block's structure."""
        return self._enter(index, next(self._batches()))

    def collect(self, index: int, groups: Sequence[Sequence[str]], kind: type[Statistic]) -> list[Statistic]:
        """Run the resident block on every window and accumulate one statistic for each group."""
        linears = self.view.linears(index)
        statistics = [kind.empty(linears[group[0]].in_features, self.view.device) for group in groups]
        handles = [
            linears[group[0]].register_forward_pre_hook(_feeder(statistic))
            for group, statistic in zip(groups, statistics, strict=True)
        ]
        try:
            for part in self._batches():
                self.view.run_block(index, *self._enter(index, part))
        finally:
            for handle in handles:
                handle.remove()
        return statistics

    def advance(self, index: int) -> None:
        """Replace the buffer by what the resident block makes of it."""
        for part in self._batches():
            self.hidden[part] = self.view.run_block(index, *self._enter(index, part)).to(self.hidden.device)


def _feeder(statistic: Statistic) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def feed(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        (x,) = arguments
        statistic.update(x.detach().reshape(-1, x.shape[-1]))

    return feed


def _home(shape: tuple[int, int, int], like: Tensor) -> torch.device:
    """Where a buffer of that shape is kept."""
    if like.device.type != "cuda":
        return like.device
    free, _ = torch.cuda.mem_get_info(like.device)
    size = shape[0] * shape[1] * shape[2] * like.element_size()
    return like.device if size < DEVICE_SHARE * free else torch.device("cpu")
