"""The training loop: seeded windows, a schedule, gradients over micro-batches, checkpoints, a log.

A method of scope model gets a `TrainJob`, says what to optimize and how, and calls `fit`. The loop
owns the order of things (gradients are cleared before the forward, masks change between steps only)
and everything needed to stop and continue without changing a bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit.blocks import block_outputs, compiled, recomputed, square_head
from sparsekit.distill import Objective, chunked_loss, headless, loss_reference, next_token_targets, plain_head
from sparsekit.errors import MethodError
from sparsekit.kernels import Kernels
from sparsekit.optim import SparseAdamW, Step, clip_factor
from sparsekit.shortage import half, twice
from sparsekit.snapshots import Snapshots
from sparsekit.state import LinearState
from sparsekit.world import ALONE, World

MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}  # enough to fill the unit
CHECKPOINT_SECONDS = 120.0
ASKED = 10  # steps between questions whether it is time, when several processes must agree
LOGGED = 100  # lines of the log of a whole run, about
VALIDATED = 10  # held-out scores of a whole run


@dataclass(frozen=True, slots=True)
class TrainJob:
    """What a method of scope model is given.

    Attributes:
        student: The model to train, in the precision it computes in; parameters require no gradient yet.
        teacher: The dense original, frozen, in eval mode.
        linears: The linears to make sparse, by full name; their parameters are called `NAME.weight`.
        tokens: Training windows, int [windows, seq_len], on the host.
        valid: Held-out windows for the log, or None.
        seed: Of the order of windows.
        directory: Where checkpoints go; it is the method's own.
        log: Takes one record of the log.
        progress: Called with (tokens done, tokens in all).
        world: The processes that do this job together, each with whole models until the method shards
            them. All are given the same; `log` and `progress` of the first one count.
    """

    student: nn.Module
    teacher: nn.Module
    linears: Mapping[str, LinearState]
    tokens: Tensor
    valid: Tensor | None
    seed: int
    directory: Path
    log: Callable[[dict[str, Any]], None]
    progress: Callable[[int, int], None]
    world: World = ALONE

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next(self.student.parameters()).device


@dataclass(frozen=True, slots=True)
class Trained:
    """What a method of scope model returns.

    Attributes:
        linears: State of every linear it was given.
        params: Every other parameter of the model by full name.
        metrics: Figures for the report.
    """

    linears: Mapping[str, LinearState]
    params: Mapping[str, Tensor]
    metrics: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long a run is and how its learning rate goes.

    Attributes:
        steps: Optimizer steps.
        batch: Windows of one step.
        lr: Highest learning rate.
        warmup: Share of the steps over which it rises from 0.
        floor: Share of `lr` it falls to.
        shape: How it falls after the warm-up: along a cosine, or only in the last 20 % (`wsd`).
    """

    steps: int
    batch: int
    lr: float
    warmup: float = 0.05
    floor: float = 0.1
    shape: Literal["cosine", "wsd"] = "cosine"

    def lr_at(self, step: int) -> float:
        """Learning rate of a step counted from 0."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return self.lr * (step + 1) / rising
        if self.shape == "wsd":
            falling = max(1, round(0.2 * self.steps))
            done = max(0.0, (step - (self.steps - falling)) / falling)
            return self.lr * (1 - (1 - self.floor) * done)
        done = (step - rising) / max(1, self.steps - rising)
        return self.lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done)))


def steps_of(tokens: int, windows: Tensor, batch: int) -> int:
    """Optimizer steps that read so many tokens.

    Raises:
        MethodError: That is less than one step.
    """
    a_step = batch * windows.shape[1]
    if tokens < a_step:
        raise MethodError(f"tokens {tokens:,} is less than one step of {batch} x {windows.shape[1]} = {a_step:,}")
    return tokens // a_step


class Policy(Protocol):
    """What a method decides at each step."""

    def numbers(self, step: int, lr: float) -> Step:
        """Learning rate, decay and so on of a step counted from 0."""
        ...

    def after(self, step: int) -> dict[str, Tensor]:
        """Called when a step is done, to change masks; returns what to log."""
        ...

    def state(self) -> dict[str, Any]:
        """What it must remember across a restart, as JSON."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state`."""
        ...


def windows_of(step: int, batch: int, count: int, seed: int) -> Tensor:
    """Which windows a step reads: every window once an epoch, in an order drawn anew for each.

    It depends on nothing but its arguments, so a restart needs no cursor.

    Args:
        step: Counted from 0.
        batch: Windows of a step.
        count: Windows there are.
        seed: Of the order.
    Returns:
        int64 [batch].
    """
    found: list[Tensor] = []
    position, wanted = step * batch, batch
    while wanted:
        epoch, start = divmod(position, count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        part = order[start : start + wanted]
        found.append(part)
        position += len(part)
        wanted -= len(part)
    return torch.cat(found)


def micro_batch_of(windows: Tensor, batch: int, device: torch.device) -> int:
    """Windows of one forward when the recipe does not say: what fills the device, and divides the batch."""
    most = max(1, min(batch, MICRO_BATCH_TOKENS[device.type] // windows.shape[1]))
    return next(size for size in range(most, 0, -1) if batch % size == 0)


@dataclass(slots=True)
class Fit:
    """One run of the loop.

    Attributes:
        job: Models, windows, places.
        optimizer: Of the student.
        policy: Decides the numbers of a step and what happens after it.
        schedule: Length and learning rate.
        objective: The loss.
        micro_batch: Windows of one forward.
        clip: Limit of the gradient's global norm.
        checkpoint_every: Steps between checkpoints; None for one every two minutes.
        compile: Compile the blocks of both models with torch.compile.
        checkpointing: Compute the student's blocks again in the backward instead of keeping what they made.
        kernels: Whether a Triton kernel computes the loss on CUDA.
    """

    job: TrainJob
    optimizer: SparseAdamW
    policy: Policy
    schedule: Schedule
    objective: Objective
    micro_batch: int
    clip: float = 1.0
    checkpoint_every: int | None = None
    compile: bool = False
    checkpointing: bool = False
    kernels: Kernels = "auto"
    _heads: tuple[nn.Linear, nn.Linear] | None = field(default=None, init=False)
    _sums: dict[str, Tensor] = field(default_factory=dict, init=False)
    _saved_at: float = field(default=0.0, init=False)
    _shortage: str = field(default="", init=False)

    def run(self) -> dict[str, Any]:
        """Train from the last checkpoint, or from the start, to the end.

        Returns:
            Figures of the run: steps, tokens, tokens a second, last losses.
        """
        job, steps = self.job, self.schedule.steps
        self._check_batch()
        job.student.train(False)  # dropout stays off: the student is compared with a teacher that has none
        job.teacher.train(False).requires_grad_(False)
        self._heads = self._plain_heads()
        first = self._restore()
        tokens_a_step = self.schedule.batch * job.tokens.shape[1]
        log_every = max(1, steps // LOGGED)
        valid_every = max(1, steps // VALIDATED)
        self._saved_at = start = time.monotonic()
        record: dict[str, Any] = {}
        # recomputation inside, so that the compiler sees it and plans with it
        with recomputed(job.student, self.checkpointing), compiled((job.student, job.teacher), self.compile):
            for step in range(first, steps):
                lr = self.schedule.lr_at(step)
                noted = self._step(step, lr)
                done = step + 1
                job.progress(done * tokens_a_step, steps * tokens_a_step)
                if done % log_every == 0 or done == steps or done % valid_every == 0:
                    with_valid = done % valid_every == 0 or done == steps
                    record = self._log(done, done * tokens_a_step, lr, noted, with_valid)
                if done < steps:
                    self._maybe_save(done)
        seconds = time.monotonic() - start
        here = (steps - first) * tokens_a_step
        return {
            "steps": steps,
            "tokens": steps * tokens_a_step,
            "tokens_per_second": here / seconds if here else 0.0,
            "chunked_loss": self._heads is not None,
            **({"out_of_memory": self._shortage} if self._shortage else {}),
            **{key: value for key, value in record.items() if key in ("loss", "kl", "ce", "valid_perplexity")},
        }

    def _check_batch(self) -> None:
        batch, size = self.schedule.batch, self.job.world.size
        if batch % size:
            raise MethodError(f"batch {batch} does not divide among {size} processes")
        if batch // size % self.micro_batch:
            of = f"batch {batch}" if size == 1 else f"the {batch // size} windows that each of {size} processes gets"
            raise MethodError(f"micro_batch {self.micro_batch} does not divide {of}")

    def _plain_heads(self) -> tuple[nn.Linear, nn.Linear] | None:
        few = self.job.tokens[:1, :32].long().to(self.job.device)
        student, teacher = plain_head(self.job.student, few), plain_head(self.job.teacher, few)
        self.job.world.rest(self.job.student)
        return (student, teacher) if student is not None and teacher is not None else None

    def _step(self, step: int, lr: float) -> dict[str, Tensor]:
        """Gradients of a batch, clip, update; returns what the policy wants logged."""
        job, batch = self.job, self.schedule.batch
        self.optimizer.zero_grad()  # before the forward: FSDP2 breaks when it stands later
        rows = job.world.share(job.tokens[windows_of(step, batch, len(job.tokens), job.seed)])
        if job.device.type == "cuda":
            rows = rows.pin_memory().to(job.device, non_blocking=True)
        if job.world.size == 1:
            sums = dict(self._sums)
            twice(lambda: self._gradients(rows), lambda: self._smaller(step, len(rows), sums))
        else:  # the other ranks would not know of a second try
            self._gradients(rows)
        self.optimizer.take_gradients()
        factor, norm = clip_factor(self.optimizer.names.values(), self.clip, job.world)
        self.optimizer.advance(self.policy.numbers(step, lr), factor)
        self._sums["steps"] = self._sums.get("steps", torch.zeros_like(norm)) + 1
        self._sums["grad_norm"] = self._sums.get("grad_norm", torch.zeros_like(norm)) + norm
        return self.policy.after(step)

    def _gradients(self, rows: Tensor) -> None:
        """Add the gradients of some windows [windows, seq_len], a micro-batch at a time."""
        share = self.micro_batch / len(rows)
        for part in torch.split(rows, self.micro_batch):
            loss, kl, ce = self._loss(part.long())
            (loss * share).backward()  # type: ignore[no-untyped-call]
            for name, value in (("loss", loss.detach()), ("kl", kl), ("ce", ce)):
                self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value * share

    def _smaller(self, step: int, windows: int, sums: dict[str, Tensor]) -> None:
        """Go on with half of the micro-batch, or the next smaller size that divides the batch; forget the first try."""
        before, most = self.micro_batch, half(self.micro_batch, "a training step")
        self.micro_batch = next(size for size in range(most, 0, -1) if windows % size == 0)
        self._shortage = f"micro_batch {before} did not fit the device at step {step}; {self.micro_batch} from there on"
        self._sums = sums
        self.optimizer.zero_grad()

    def _loss(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, divergence and cross-entropy of some windows [windows, seq_len]."""
        if not self.objective.hidden:
            return self._token_loss(tokens)
        with block_outputs(self.job.student) as own, block_outputs(self.job.teacher) as taught:
            loss, kl, ce = self._token_loss(tokens)
        return loss + self.objective.hidden * square_head(own, taught), kl, ce

    def _token_loss(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The part of the loss that the logits decide; runs the teacher if any part needs it."""
        job, targets, objective = self.job, next_token_targets(tokens), self.objective
        distil = objective.kl > 0 or objective.hidden > 0
        if self._heads is None:
            student = job.student(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
            teacher = None
            if distil:
                with torch.no_grad():
                    teacher = job.teacher(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
            loss, kl, ce = loss_reference(student, teacher if objective.kl else None, targets, objective)
            return loss, kl.detach(), ce.detach()
        own, taught = self._heads
        with headless(job.student, own):
            hidden = job.student(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
        teacher_hidden = None
        if distil:
            with torch.no_grad(), headless(job.teacher, taught):
                teacher_hidden = job.teacher(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
        return chunked_loss(hidden, own, teacher_hidden, taught, targets, objective, self.kernels)

    def _log(self, done: int, tokens: int, lr: float, noted: Mapping[str, Tensor], with_valid: bool) -> dict[str, Any]:
        """Write one record: means since the last one, and the held-out perplexity now and then."""
        self._sums = self.job.world.means(self._sums)
        count = float(self._sums.pop("steps"))
        record: dict[str, Any] = {"step": done, "tokens": tokens, "lr": lr}
        record |= {name: float(value) / count for name, value in self._sums.items()}
        record |= {name: float(value) for name, value in noted.items()}
        if not math.isfinite(record["loss"]):
            raise MethodError(f"the loss is {record['loss']} at step {done}; lower lr, or train in a wider dtype")
        if with_valid and self.job.valid is not None:
            record["valid_perplexity"] = math.exp(mean_loss(self.job.student, self.job.valid, self.micro_batch))
            self.job.world.rest(self.job.student)
        self._sums.clear()
        self.job.log(record)
        return record

    def _maybe_save(self, done: int) -> None:
        if self.checkpoint_every is not None:
            due = done % self.checkpoint_every == 0
        elif self.job.world.size > 1:  # the clock of one decides, and is asked now and then: it takes an exchange
            waited = time.monotonic() - self._saved_at
            due = done % ASKED == 0 and self.job.world.told(waited) > CHECKPOINT_SECONDS
        else:
            due = time.monotonic() - self._saved_at > CHECKPOINT_SECONDS
        if due:
            self._save(done)
            self._saved_at = time.monotonic()

    def _save(self, done: int) -> None:
        self._sums = self.job.world.means(self._sums)
        self.snapshots.save(done, self.optimizer, self._sums, {"policy": self.policy.state()})

    def _restore(self) -> int:
        """Load the newest whole checkpoint; returns the step to go on with."""
        found = self.snapshots.restore(self.optimizer, self.job.device)
        if found is None:
            return 0
        described, self._sums = found
        self.policy.restore(described["policy"])
        return int(described["step"])

    @property
    def snapshots(self) -> Snapshots:
        """The checkpoints of this run."""
        return Snapshots(self.job.directory, self.job.world)


@torch.no_grad()
def mean_loss(model: nn.Module, windows: Tensor, batch: int) -> float:
    """Mean next-token loss over windows [windows, seq_len]."""
    total = 0.0
    device = next(model.parameters()).device
    with torch.compiler.set_stance("force_eager"):  # its shapes and grad mode would be compiled anew
        for part in torch.split(windows, batch):
            tokens = part.long().to(device)
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
            for row, target in zip(logits, tokens[:, 1:], strict=True):  # one window in float32 at a time
                total += float(F.cross_entropy(row.float(), target, reduction="sum"))
    return total / (len(windows) * (windows.shape[1] - 1))
