"""A few seconds of the real work on made-up values, to predict how long all of it takes.

What a run spends its time on is run here on the device in its own code: a block's forward, a statistic's
update, the method on single linears and the proof of its result, a training block's backward, the head
and the comparison of logits. What does not fit the budget is extrapolated from smaller linears of the same step.

On CUDA the first call of everything is not counted: it loads and compiles kernels. What first calls took
beyond later ones is the start-up, which a process pays once and not for every layer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from sparsekit.blockwise.activations import free_memory
from sparsekit.blockwise.stacking import STACK_BYTES, STACK_SHARE, STACKING
from sparsekit.errors import PluginError
from sparsekit.evaluation.evaluate import agreement, window_losses
from sparsekit.models.shapes import BlockSizes, ModelSizes, Shape, entering, width_of
from sparsekit.models.view import ModelView
from sparsekit.pattern import Pattern
from sparsekit.planning.plan import PlannedStep
from sparsekit.state import Group, LinearState
from sparsekit.stats import added, begun
from sparsekit.verify import same_group, verified

BUDGET = 5.0  # seconds for everything
SAMPLE = 1024  # tokens of a made-up Gram matrix
SLOW = 0.3  # seconds for one figure, unless a single run takes longer
REPEATS = 10
MOVED = 64 * 2**20  # bytes of a tensor that times the memory
SMALL = 2048  # tokens of a timed forward, at most, on a CPU; a GPU is timed with what a run gives it
LOGITS = 2**22  # logits that are compared to time it, about


@dataclass(slots=True)
class Bench:
    """Timings on one device.

    Attributes:
        view: The model, opened with `empty`.
        sizes: Its sizes.
        budget: Seconds for all of it.
        deadline: When they are over.
        notes: What was extrapolated.
        startup: Seconds that first calls took beyond later ones, so far.
    """

    view: ModelView
    sizes: ModelSizes
    budget: float = BUDGET
    deadline: float = field(default_factory=lambda: time.monotonic() + BUDGET)
    notes: list[str] = field(default_factory=list)
    startup: float = 0.0

    def timed(self, work: Callable[[], Any]) -> float:
        """Seconds of the fastest of a few runs after a warm-up: other processes only ever make one slower."""
        first = self.once(work)
        if self.view.device.type != "cuda" and first > SLOW:
            return first  # it warms up little, and the budget is small
        best, started = self.once(work), time.monotonic()
        if self.view.device.type == "cuda":
            self.startup += max(0.0, first - best)
            self.deadline += max(0.0, first - best)
        for _ in range(REPEATS):
            if time.monotonic() + best - started > SLOW:
                break
            best = min(best, self.once(work))
        return best

    def once(self, work: Callable[[], Any]) -> float:
        """Seconds of one run, the device's work included."""
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

    def forward_seconds(self, windows: int, seq_len: int, *, backward: bool = False) -> float:
        """Seconds for a token through the largest block in forwards of so many windows; with its backward if asked."""
        if self.view.device.type != "cuda":
            windows = max(1, min(windows, 8, SMALL // seq_len))
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
        tokens = 4096 if self.view.device.type == "cuda" else 256
        weight, hidden = self.random(vocabulary, self.sizes.width), self.random(tokens, self.sizes.width)
        with torch.inference_mode():
            seconds = self.timed(lambda: F.linear(hidden, weight))
        return seconds / tokens * self.sizes.vocabulary / vocabulary

    def comparing_seconds(self, seq_len: int, *, dense: bool) -> float:
        """Seconds for a token's loss from its logits, and for the agreement with the dense model's."""
        length = max(2, min(seq_len, LOGITS // self.sizes.vocabulary))
        logits = self.random(1, length, self.sizes.vocabulary)
        tokens = torch.zeros(1, length, dtype=torch.int64)

        def work() -> None:
            window_losses(logits, tokens)
            if dense:
                agreement(logits, logits)

        with torch.inference_mode():
            return self.timed(work) / length

    def statistic_seconds(self, kind: type[Any], inputs: int) -> float:
        """Seconds for a token added to a statistic."""
        statistic, x = begun(kind, inputs, self.view.device), self.random(SAMPLE, inputs)
        with torch.inference_mode():
            return self.timed(lambda: added(statistic, x)) / SAMPLE

    def method_seconds(self, planned: PlannedStep, block: BlockSizes) -> dict[str, float]:
        """Seconds of a method on each linear of a block, or on each group by its first linear.

        The cheapest come first; those that no longer fit the budget follow from the last two by a
        power of their cost, out · in + in² / 3 times in.
        """
        units: list[tuple[list[str], int]] = []
        for group in block.groups:
            chosen = [name for name in group if name in planned.selected]
            parts = [chosen] if self._together(planned, [block.linears[n] for n in chosen]) else [[n] for n in chosen]
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

    def _together(self, planned: PlannedStep, shapes: Sequence[Shape]) -> bool:
        """Whether a run hands the linears of a group over as one: a group, or a stack of rows on CUDA."""
        method, device = planned.step.method, self.view.device
        if method.scope == "group":
            return True
        size = sum(out * into for out, into in shapes) * STACK_BYTES
        return (
            device.type in STACKING
            and method.stats is not None
            and method.by_rows(planned.arguments)
            and size <= STACK_SHARE * free_memory(device)
        )

    def _solve(self, planned: PlannedStep, names: Sequence[str], shapes: Sequence[Shape], into: int) -> float:
        """The method on made-up linears with one input, and the proof of what it returns."""
        method = planned.step.method
        if method.scope != "group" and len(names) > 1:  # a stack
            names, shapes = names[:1], [(sum(out for out, _ in shapes), into)]
        with torch.inference_mode():
            states = {name: self._made_up(planned, name, shape) for name, shape in zip(names, shapes, strict=True)}
            given: LinearState | Group = states[names[0]]
            if method.scope == "group":
                given = Group(states, tie=_same, untie=_same)
            arguments: list[Any] = [given]
            statistic = None
            if method.stats is not None:
                statistic = begun(method.stats, into, self.view.device)
                added(statistic, self.random(SAMPLE, into))
                arguments.append(statistic)

            def work() -> None:
                result = method.guarded(*arguments, **planned.arguments)
                group = same_group(result, states) if method.scope == "group" else Group({names[0]: result})
                scale = group.input_scale
                for name, after in group.linears.items():
                    pattern = planned.patterns.get(name)
                    verified(
                        states[name], after, kind=method.kind, pattern=pattern, statistic=statistic, input_scale=scale
                    )

            try:
                return self.timed(work)
            except PluginError as error:
                raise PluginError(f"{names[0]}, with made-up weights for the plan: {error}") from error

    def _made_up(self, planned: PlannedStep, name: str, shape: Shape) -> LinearState:
        """A linear as the step will find it: pruned, if a step before has done so."""
        weight = self.random(*shape, dtype=torch.float32) / math.sqrt(shape[1])
        pattern, method = planned.patterns.get(name), planned.step.method
        pruned = pattern is not None and method.accepts(Pattern) is None
        mask = pattern.keep(weight.abs()) if pattern is not None and pruned else None
        return LinearState(name, weight, mask=mask, dense=weight if method.dense else None)

    def bytes_per_second(self) -> float:
        """What an elementwise operation moves in memory."""
        one, two = (torch.ones(MOVED // 4, device=self.view.device) for _ in range(2))
        return 3 * MOVED / self.timed(lambda: one.add_(two))


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
