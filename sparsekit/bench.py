"""Compress one Llama block of random weights with sparsekit and with the papers' column recursion, and compare.

Both sides get the same block, the same hidden states and the same device, in one process. A side's
time is all of its work on the block: forwards, Gram matrices, factors, sweeps and the forward that
feeds the next block; ours verifies every layer besides. Files are not part of it. The error is that of
the compressed block's outputs, relative to what the block adds to its inputs.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsekit.blockwise.activations import Activations
from sparsekit.blockwise.stacking import sent
from sparsekit.blockwise.walk import Walk, resident
from sparsekit.checkpoint import BlockState, StepStore
from sparsekit.madeup import Shape, write_model
from sparsekit.models.view import ModelView
from sparsekit.pattern import Pattern
from sparsekit.registry import METHODS
from sparsekit.state import LinearState
from sparsekit.sweep.recursion import Recursion

SCHEDULES = ("block", "group")
PRUNED = 0.4  # share of zeros from which a layer counts as pruned; int4 rounds a tenth of the weights to 0
WARM_UP = 1  # runs of our side before its times count; Triton compiles in the first

LLAMA_7B = Shape(4096, 11008, 32, 128, 2048)
SMALL = Shape(256, 768, 4, 8, 128)


@dataclass(frozen=True, slots=True)
class Job:
    """One method: how a recipe writes it, and what the recursion is to do."""

    method: str
    arguments: Mapping[str, Any]
    recursion: Callable[[Recursion], Tensor]


JOBS = {
    "sparsegpt 2:4": Job("sparsegpt", {"group_order": "natural"}, lambda layer: layer.pruned(2, 4)),
    "gptq int4 g128": Job("gptq", {"act_order": "none"}, lambda layer: layer.quantized(4)),
}


class Overrun(Exception):
    """A side took longer than its limit; the message says how far it came."""


class Side(Protocol):
    """One linear on its way through somebody else's class."""

    def add(self, x: Tensor) -> None:
        """Take a sample's inputs, [tokens, in]."""

    def solve(self) -> None:
        """Compress the linear in place."""


class Restated:
    """The recursion as a `Side`."""

    def __init__(self, linear: nn.Linear, job: Job) -> None:
        self._linear, self._job = linear, job
        self._recursion = Recursion(linear.weight)
        self.add = self._recursion.add

    def solve(self) -> None:
        """Compress the linear in place."""
        self._linear.weight.copy_(self._job.recursion(self._recursion))


class Bench:
    """One block on one device.

    Args:
        shape: Of the block and the tokens.
        device: `auto` is CUDA when there is one.
        directory: For the model's files.
    """

    def __init__(self, shape: Shape, device: str, directory: Path) -> None:
        where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        dtype = torch.float32 if where == "cpu" else torch.bfloat16
        self.view = ModelView.open(write_model(directory, shape, dtype), device=where)
        self.shape = shape
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(0, 256, (shape.samples, shape.length), generator=generator)
        self.stream = Activations.begin(self.view, self.tokens)
        self._mix(generator)
        given = self.view.dense_block(0)
        self.block = BlockState({n: sent(s, self.view.device) for n, s in given.linears.items()}, given.params)
        self.inputs = self.stream.hidden.clone()
        self.dense = self._outputs(self.block)

    def _mix(self, generator: torch.Generator) -> None:
        """Make the hidden states those of no finite vocabulary, correlated and with a few large channels."""
        width = self.shape.width
        mixing = (torch.randn(width // 16, width, generator=generator) / 2).to(self.stream.hidden)
        scale = (2 * torch.randn(width, generator=generator)).exp().clamp(max=30).to(self.stream.hidden)
        for part in torch.split(self.stream.hidden, 1):
            noise = torch.randn(*part.shape[:2], width // 16, generator=generator).to(part)
            part.add_(noise @ mixing).mul_(scale)

    def _fresh(self) -> Activations:
        """The hidden states before the block."""
        self.stream.hidden.copy_(self.inputs)
        self.stream.block = 0
        return self.stream

    def _outputs(self, block: BlockState) -> Tensor:
        """What a block makes of the first windows."""
        with resident(self.view, 0, block):
            return self.view.run_block(0, *self._fresh().sample(0)).float()

    def error(self, block: BlockState) -> float:
        """Squared error of a block's outputs relative to what the dense block adds to its inputs."""
        entered = self._fresh().sample(0)[0].float()
        change = self._outputs(block) - self.dense
        return float(change.square().sum() / (self.dense - entered).square().sum())

    def ours(self, job: Job, schedule: str) -> BlockState:
        """Compress the block with sparsekit and take the hidden states through it."""
        walk = Walk(
            view=self.view,
            method=METHODS.get(job.method),
            arguments=job.arguments,
            selected=frozenset(self.block.linears),
            patterns={name: Pattern(2, 4) for name in self.block.linears} if job.method == "sparsegpt" else {},
            before=lambda index: self.block,
            store=StepStore(Path(), self.view.dtype),
            tokens=self.tokens,
            schedule=schedule,
            progress=lambda done, total: None,
        )
        stream = self._fresh()
        after = walk.compressed(0, self.block, stream)
        with resident(self.view, 0, after):
            stream.advance(0)
        return after

    def theirs(self, side: Callable[[nn.Linear], Side], limit: float) -> BlockState:
        """Compress it with a class for each linear, sample by sample, as the papers' scripts do.

        Raises:
            Overrun: It has taken more than `limit` seconds, looked at between samples and between linears.
        """
        stream, start = self._fresh(), time.perf_counter()

        def in_time(done: int, of: int, what: str) -> None:
            if time.perf_counter() - start > limit and done < of:
                raise Overrun(f"{done} of {of} {what}")

        with resident(self.view, 0, self.block):
            linears = self.view.linears(0)
            sides = {name: side(linear) for name, linear in linears.items()}
            hooks = [linear.register_forward_hook(_adder(sides[name])) for name, linear in linears.items()]
            micro_batch, stream.micro_batch = stream.micro_batch, 1
            stream.calls.setdefault(1, self.view.begin(self.tokens[:1].to(self.view.device))[1])
            try:
                for sample in range(self.shape.samples):
                    self.view.run_block(0, *stream.enter(0, slice(sample, sample + 1)))
                    in_time(sample + 1, self.shape.samples, "windows")
                for hook in hooks:
                    hook.remove()
                for number, each in enumerate(sides.values()):
                    in_time(number, len(sides), "linears")
                    each.solve()
                stream.advance(0)
            finally:
                for hook in hooks:
                    hook.remove()
                stream.micro_batch = micro_batch
            found = {n: LinearState(n, linear.weight.detach().float()) for n, linear in linears.items()}
        return BlockState(found, self.block.params)

    def once(self, work: Callable[[], BlockState]) -> tuple[float, int, BlockState]:
        """Seconds of some work, the device's included, the bytes it allocated there at most, and its result."""
        cuda = self.view.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.view.device)
            torch.cuda.reset_peak_memory_stats(self.view.device)
        resting, start = torch.cuda.memory_allocated(self.view.device) if cuda else 0, time.perf_counter()
        block = work()
        if cuda:
            torch.cuda.synchronize(self.view.device)
        took = time.perf_counter() - start
        return took, torch.cuda.max_memory_allocated(self.view.device) - resting if cuda else 0, block

    def compared(
        self, job: Job, others: Mapping[str, Callable[[nn.Linear], Side]], repeats: int, theirs: int, limit: float
    ) -> Iterator[dict[str, Any]]:
        """One row for each schedule of ours and each other side, in this order; equal weights are to the first."""
        first: BlockState | None = None
        sides = [(f"sparsekit {each}", partial(self.ours, job, each), WARM_UP, repeats) for each in SCHEDULES]
        sides += [(name, partial(self.theirs, side, limit), 0, theirs) for name, side in others.items()]
        for name, work, warm, times in sides:
            start = time.perf_counter()
            try:
                for _ in range(warm):
                    work()
                runs = [self.once(work)[:2] for _ in range(times - 1)]
                *last, block = self.once(work)
            except Overrun as overrun:
                yield {"side": name, "seconds": time.perf_counter() - start, "runs": 0, "stopped": str(overrun)}
                continue
            seconds, peaks = zip(*runs, tuple(last), strict=True)
            first = block if first is None else first
            row = {"side": name, "seconds": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}
            row |= {"runs": times, "peak": max(peaks), "error": self.error(block)}
            yield {**row, "equal": agreement(first, block)}


def with_ratios(row: dict[str, Any], before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row with how many times as long it took as each of the rows of ours before it."""
    ours = {own["side"]: own["seconds"] for own in before[: len(SCHEDULES)]}
    return row | {"ratios": {name: row["seconds"] / seconds for name, seconds in ours.items()}}


def described(small: bool) -> dict[str, int]:
    """The shape as data."""
    return asdict(SMALL if small else LLAMA_7B)


def agreement(one: BlockState, other: BlockState) -> float:
    """Share of weights that are the same in both blocks to one part in 256; of pruned layers, of their zeros."""
    same = total = 0
    for name, state in one.linears.items():
        a, b = state.weight, other.linears[name].weight
        pruned = bool((a == 0).float().mean() > PRUNED)
        # stored as bfloat16 and with scales in float16 or not, equal codes differ by less than that
        equal = (a == 0) == (b == 0) if pruned else (a - b).abs() <= torch.maximum(a.abs(), b.abs()) / 256
        same += int(equal.sum())
        total += a.numel()
    return same / total


def _adder(side: Side) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def add(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        side.add(arguments[0].reshape(-1, arguments[0].shape[-1]))

    return add


def run_bench(
    shape: Shape,
    device: str = "auto",
    *,
    jobs: Sequence[str] = tuple(JOBS),
    others: Mapping[str, Mapping[str, Callable[[nn.Linear], Side]]] | None = None,
    repeats: int = 3,
    theirs: int = 1,
    recursion: bool = True,
    limit: float = math.inf,
    told: Callable[[str, list[dict[str, Any]]], None] = lambda name, rows: None,
    so_far: Callable[[dict[str, list[dict[str, Any]]]], None] = lambda found: None,
) -> dict[str, list[dict[str, Any]]]:
    """Both sides of some jobs on one block of random weights.

    Args:
        shape: Of the block and the tokens.
        device: Where.
        jobs: Names out of `JOBS`.
        others: Further sides by job and name, run after ours.
        repeats: Timed runs of our side.
        theirs: Runs of the others, which take seconds.
        recursion: Run the restated recursion too, last.
        limit: Seconds that a run of another side may take; its row then tells how far it came.
        told: Called with each job's rows.
        so_far: Called with everything there is whenever there is one more row.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
        bench = Bench(shape, device, Path(directory))
        for name in jobs:
            job = JOBS[name]
            sides: dict[str, Callable[[nn.Linear], Side]] = dict((others or {}).get(name, {}))
            if recursion:
                sides["the recursion"] = partial(Restated, job=job)
            rows = found[name] = []
            for row in bench.compared(job, sides, repeats, theirs, limit):
                rows.append(with_ratios(row, rows))
                so_far(found)
            told(name, rows)
    return found
