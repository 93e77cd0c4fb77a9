"""A few seconds of the real work on made-up values, to predict how long all of it takes.

What a run spends its time on is run here on the device in its own code: a block's forward, a statistic's
update, the method on single linears, a training block's backward, the head, the disk. What does not fit
the budget is extrapolated from smaller linears of the same step.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sparsekit.models.shapes import BlockSizes, ModelSizes, Shape, entering, width_of
from sparsekit.models.view import ModelView
from sparsekit.planning.plan import PlannedStep
from sparsekit.state import Group, LinearState

BUDGET = 5.0  # seconds for everything
SAMPLE = 1024  # tokens of a made-up Gram matrix
DISK = 32 * 2**20  # bytes written to time the disk
SLOW = 0.3  # seconds for one figure, unless a single run takes longer
REPEATS = 10
MOVED = 64 * 2**20  # bytes of a tensor that times the memory
SMALL = 2048  # tokens of a timed forward, at most


@dataclass(slots=True)
class Bench:
    """Timings on one device.

    Attributes:
        view: The model, opened with `empty`.
        sizes: Its sizes.
        budget: Seconds for all of it.
        deadline: When they are over.
        notes: What was extrapolated.
    """

    view: ModelView
    sizes: ModelSizes
    budget: float = BUDGET
    deadline: float = field(default_factory=lambda: time.monotonic() + BUDGET)
    notes: list[str] = field(default_factory=list)

    def timed(self, work: Callable[[], Any]) -> float:
        """Seconds of the fastest of a few runs after a warm-up: other processes only ever make one slower."""
        started, best = time.monotonic(), self._once(work)
        if best > SLOW:
            return best
        best = self._once(work)
        for _ in range(REPEATS):
            if time.monotonic() - started > SLOW:
                break
            best = min(best, self._once(work))
        return best

    def _once(self, work: Callable[[], Any]) -> float:
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.view.device.type == "cuda":
            torch.cuda.synchronize(self.view.device)

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Made-up values of the scale of hidden states."""
        return torch.randn(*shape, dtype=dtype or self.view.compute_dtype, device=self.view.device)

    @contextmanager
    def block(self) -> Iterator[int]:
        """The largest block with made-up weights on the device; its index."""
        index = self.sizes.blocks.index(self.sizes.largest)
        self.view.pretend(index, self._weight)
        try:
            yield index
        finally:
            self.view.release(index)

    def _weight(self, shape: torch.Size) -> torch.Tensor:
        if len(shape) < 2:
            return torch.ones(shape, dtype=self.view.compute_dtype, device=self.view.device)
        return self.random(*shape) / math.sqrt(shape[-1])

    def forward_seconds(self, seq_len: int, *, backward: bool = False) -> float:
        """Seconds for a token through the largest block; with its backward if asked for."""
        windows = max(1, min(8, SMALL // seq_len))
        call = None
        with self.block() as index, torch.enable_grad() if backward else torch.inference_mode():
            call = entering(self.view, windows, seq_len)[index]
            hidden = self.random(windows, seq_len, width_of(self.view))
            module = self.view.module.get_submodule(self.view.blocks[index])
            module.requires_grad_(backward)

            def work() -> None:
                output = self.view.run_block(index, hidden, call)
                if backward:
                    output.sum().backward()  # type: ignore[no-untyped-call]
                    module.zero_grad()

            return self.timed(work) / (windows * seq_len)

    def head_seconds(self) -> float:
        """Seconds for a token through the head."""
        vocabulary = min(self.sizes.vocabulary, 32768)
        weight, hidden = self.random(vocabulary, self.sizes.width), self.random(256, self.sizes.width)
        with torch.inference_mode():
            seconds = self.timed(lambda: F.linear(hidden, weight))
        return seconds / 256 * self.sizes.vocabulary / vocabulary

    def statistic_seconds(self, kind: type[Any], inputs: int) -> float:
        """Seconds for a token added to a statistic."""
        statistic, x = kind.empty(inputs, self.view.device), self.random(SAMPLE, inputs)
        with torch.inference_mode():
            return self.timed(lambda: statistic.update(x)) / SAMPLE

    def method_seconds(self, planned: PlannedStep, block: BlockSizes) -> dict[str, float]:
        """Seconds of a method on each linear of a block, or on each group by its first linear.

        The cheapest come first; those that no longer fit the budget follow from the last two by a
        power of their cost, out · in + in² / 3 times in.
        """
        units: list[tuple[list[str], int]] = []
        for group in block.groups:
            chosen = [name for name in group if name in planned.selected]
            parts = [chosen] if planned.step.method.scope == "group" else [[name] for name in chosen]
            units += [(names, block.linears[group[0]][1]) for names in parts if names]
        found: dict[str, float] = {}
        known: dict[tuple[Shape, ...], float] = {}
        points: list[tuple[float, float]] = []
        for names, into in sorted(units, key=lambda unit: _cost([block.linears[n] for n in unit[0]])):
            shapes = tuple(block.linears[name] for name in names)
            cost = _cost(shapes)
            if shapes not in known:
                expected = _extrapolated(points, cost) if points else 0.0
                if points and time.monotonic() + 2 * expected > self.deadline:
                    known[shapes] = expected
                    self.notes.append(f"{planned.title}: the time for {names[0]} {list(shapes[0])} is extrapolated")
                else:
                    known[shapes] = self._solve(planned, names, shapes, into)
                    points.append((cost, known[shapes]))
            found[names[0]] = known[shapes]
        return found

    def _solve(self, planned: PlannedStep, names: Sequence[str], shapes: Sequence[Shape], into: int) -> float:
        """The method on made-up linears with one input."""
        method = planned.step.method
        with torch.inference_mode():
            states = {
                name: LinearState(name, self.random(*shape, dtype=torch.float32) / math.sqrt(into))
                for name, shape in zip(names, shapes, strict=True)
            }
            given: LinearState | Group = states[names[0]]
            if method.scope == "group":
                given = Group(states, tie=_same, untie=_same)
            arguments: list[Any] = [given]
            if method.stats is not None:
                statistic = method.stats.empty(into, self.view.device)
                statistic.update(self.random(SAMPLE, into))
                arguments.append(statistic)
            return self.timed(lambda: method.function(*arguments, **planned.arguments))

    def bytes_per_second(self) -> float:
        """What an elementwise operation moves in memory."""
        one, two = (torch.ones(MOVED // 4, device=self.view.device) for _ in range(2))
        return 3 * MOVED / self.timed(lambda: one.add_(two))

    def disk_seconds(self, directory: Path) -> float:
        """Seconds for a byte written and synced."""
        place = next(parent for parent in [directory.absolute(), *directory.absolute().parents] if parent.is_dir())
        path = place / f".sparsekit-{os.getpid()}.tmp"
        data = os.urandom(2**20) * (DISK // 2**20)
        start = time.perf_counter()
        try:
            with open(path, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        finally:
            path.unlink(missing_ok=True)
        return (time.perf_counter() - start) / DISK


def _same(vector: torch.Tensor) -> torch.Tensor:
    return vector


def _cost(shapes: Sequence[Shape]) -> float:
    """Relative cost of solving linears with one input: a factorisation, and a sweep of each."""
    into = shapes[0][1]
    return into**2 * (into / 3 + sum(out for out, _ in shapes))


def _extrapolated(points: Sequence[tuple[float, float]], cost: float) -> float:
    """Time at a cost, from the last two times measured."""
    (last, seconds), power = points[-1], 1.0
    if len(points) > 1 and points[-2][0] < last:
        power = math.log(max(seconds, 1e-9) / max(points[-2][1], 1e-9)) / math.log(last / points[-2][0])
    return float(seconds * (cost / last) ** min(max(power, 0.3), 1.2))
