"""The training loop: seeded windows, a schedule, gradients over micro-batches, checkpoints, a log.

A method of scope model gets a `TrainJob`, says what to optimize and how, and calls `fit`. The loop
owns the order of things (gradients are cleared before the forward, masks change between steps only)
and everything needed to stop and continue without changing a bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit.errors import CheckpointError, MethodError, NumericsError
from sparsekit.files import read_json, write_json
from sparsekit.kernels import Kernels
from sparsekit.shortage import half, twice
from sparsekit.training.blocks import block_outputs, compiled, recomputed, square_head
from sparsekit.training.distill import Objective, chunked_loss, headless, loss_reference, next_token_targets, plain_head
from sparsekit.training.job import Policy, Trained, TrainJob
from sparsekit.training.optim import SparseAdamW, Step, clip_factor
from sparsekit.training.schedule import Schedule, steps_in, undivided, windows_of
from sparsekit.training.snapshots import Snapshots

__all__ = ["Fit", "Policy", "TrainJob", "Trained", "mean_loss"]

CHECKPOINT_SECONDS = 120.0
LENGTH = "length.json"  # number of steps of a run that a budget in minutes sized
WARMED, MEASURED = 3, 4  # steps before and in the measurement of a step
ASKED = 10  # steps between questions whether it is time, when several processes must agree
MOST_LOSS = 700.0  # exp of more is no float64
LOGGED = 100  # lines of the log of a whole run, about
VALIDATED = 10  # held-out scores of a whole run


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
        minutes: Take as many steps as fit into so many minutes, whatever the schedule says; the first run
            measures a few and writes the number down, so that a restart has the same.
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
    minutes: float | None = None
    _heads: tuple[nn.Linear, nn.Linear] | None = field(default=None, init=False)
    _sums: dict[str, Tensor] = field(default_factory=dict, init=False)
    _saved_at: float = field(default=0.0, init=False)
    _shortage: str = field(default="", init=False)

    def run(self) -> dict[str, Any]:
        """Train from the last checkpoint, or from the start, to the end.

        Returns:
            Figures of the run: steps, tokens, tokens a second, last losses.
        """
        job, began = self.job, time.monotonic()
        self._check_batch()
        job.student.train(False)  # dropout stays off: the student is compared with a teacher that has none
        job.teacher.train(False).requires_grad_(False)
        self._heads = self._plain_heads()
        tokens_a_step = self.schedule.batch * job.tokens.shape[1]
        record: dict[str, Any] = {}
        # recomputation inside, so that the compiler sees it and plans with it
        with recomputed(job.student, self.checkpointing), compiled((job.student, job.teacher), self.compile):
            if self.minutes is not None:
                self._size(self.minutes, began)
            steps, first = self.schedule.steps, self._restore()
            log_every = max(1, steps // LOGGED)
            valid_every = max(1, steps // VALIDATED)
            self._saved_at = start = time.monotonic()
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
        if wrong := undivided(self.schedule.batch, self.micro_batch, self.job.world.size):
            raise MethodError(wrong[1])

    def _plain_heads(self) -> tuple[nn.Linear, nn.Linear] | None:
        few = self.job.tokens[:1, :32].long().to(self.job.device)
        student, teacher = plain_head(self.job.student, few), plain_head(self.job.teacher, few)
        self.job.world.rest(self.job.student)
        return (student, teacher) if student is not None and teacher is not None else None

    def _size(self, minutes: float, began: float) -> None:
        """Read how many steps the run has, or measure it.

        The number is rounded down to whole steps of `MEASURED` steps' mean time, and belongs to the run
        from then on: another machine that goes on with it takes as many.
        """
        path = self.job.directory / LENGTH
        if not path.exists():
            a_step = self._seconds_a_step()
            steps = steps_in(minutes, self.job.world.told(time.monotonic() - began), self.job.world.told(a_step))
            if self.job.world.first:
                write_json(path, {"steps": steps, "seconds_a_step": a_step})
            self.job.world.wait()
        steps = int(read_json(path)["steps"])
        self.schedule = replace(self.schedule, steps=steps)
        self.policy.resize(steps)

    def _seconds_a_step(self) -> float:
        """Time of whole steps at a learning rate of 0, which leave no trace."""
        for number in range(WARMED + MEASURED):
            if number == WARMED:
                self.job.world.wait()
                _finished(self.job.device)
                start = time.monotonic()
            factor, _ = self._whole_gradients(number)
            self.optimizer.advance(Step(1, lr=0.0), factor)
        _finished(self.job.device)
        seconds = (time.monotonic() - start) / MEASURED
        self.optimizer.forget()
        self._sums.clear()
        return seconds

    def _step(self, step: int, lr: float) -> dict[str, Tensor]:
        """Gradients of a batch, clip, update; returns what the policy wants logged."""
        factor, norm = self._whole_gradients(step)
        self.optimizer.advance(self.policy.numbers(step, lr), factor)
        self._sums["steps"] = self._sums.get("steps", torch.zeros_like(norm)) + 1
        self._sums["grad_norm"] = self._sums.get("grad_norm", torch.zeros_like(norm)) + norm
        return self.policy.after(step)

    def _whole_gradients(self, step: int) -> tuple[Tensor, Tensor]:
        """Gradients of a batch; returns what they are to be multiplied by, and their norm."""
        job, batch = self.job, self.schedule.batch
        self.optimizer.zero_grad()  # before the forward: FSDP2 breaks when it stands later
        rows = job.world.share(job.tokens[windows_of(step, batch, len(job.tokens), job.seed)])
        rows = (rows.pin_memory() if job.device.type == "cuda" else rows).to(job.device, non_blocking=True)
        if job.world.size == 1:
            sums = dict(self._sums)
            twice(lambda: self._backward(rows), lambda: self._smaller(step, len(rows), sums))
        else:  # the other ranks would not know of a second try
            self._backward(rows)
        self.optimizer.take_gradients()
        return clip_factor(self.optimizer.names.values(), self.clip, job.world)

    def _backward(self, rows: Tensor) -> None:
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
            raise NumericsError(f"the loss is {record['loss']} at step {done}; lower lr, or train in a wider dtype")
        if with_valid and self.job.valid is not None:
            loss = mean_loss(self.job.student, self.job.valid, self.micro_batch)
            record["valid_perplexity"] = math.exp(min(loss, MOST_LOSS))
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
        about = {"steps": self.schedule.steps, "policy": self.policy.state()}
        self.snapshots.save(done, self.optimizer, self._sums, about)

    def _restore(self) -> int:
        """Load the newest whole checkpoint; returns the step to go on with."""
        found = self.snapshots.restore(self.optimizer, self.job.device)
        if found is None:
            return 0
        described, self._sums = found
        if described["steps"] != self.schedule.steps:
            raise CheckpointError(
                f"{self.job.directory} is of a run of {described['steps']} steps, not {self.schedule.steps}; remove it"
            )
        if not self.optimizer.moved:
            raise CheckpointError(f"{self.job.directory}: every second moment is 0 after {described['step']} steps")
        self.policy.restore(described["policy"])
        return int(described["step"])

    @property
    def snapshots(self) -> Snapshots:
        """The checkpoints of this run."""
        return Snapshots(self.job.directory, self.job.world)


def _finished(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
