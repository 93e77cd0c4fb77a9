"""How long a training run is, how its learning rate goes, and which windows a step reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from sparsekit.errors import MethodError
from sparsekit.units import Count

MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}  # enough to fill the unit
SPARE = 0.05  # of the minutes of a budget: validation, checkpoints and the log are in no measured step


def undivided(batch: int, micro_batch: int | None, processes: int) -> tuple[str, str] | None:
    """Which setting keeps a step's windows from dividing among processes and forwards, and why; None if they divide."""
    if batch % processes:
        return "gpus", f"batch {batch} does not divide among {processes} processes"
    share = batch // processes
    if micro_batch is None or share % micro_batch == 0:
        return None
    of = f"batch {batch}" if processes == 1 else f"the {share} windows that each of {processes} processes gets"
    return "micro_batch", f"micro_batch {micro_batch} does not divide {of}"


class Budget(BaseModel):
    """How long a run may take, in place of a number of tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    minutes: Annotated[float, Field(gt=0)] = Field(description="Wall time, compilation included.")


class Length(BaseModel):
    """What `budget:` of a recipe may say. Tokens are the step's `tokens:` in another spelling, and read as such."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    minutes: Annotated[float, Field(gt=0)] | None = Field(None, description="Wall time, compilation included.")
    tokens: Count | None = Field(None, description="Training tokens in all.")

    @model_validator(mode="after")
    def _one(self) -> Length:
        if (self.minutes is None) == (self.tokens is None):
            raise ValueError("budget takes minutes or tokens, one of them")
        return self


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


def steps_in(minutes: float, spent: float, a_step: float) -> int:
    """Optimizer steps that fit into a budget.

    Args:
        minutes: The budget.
        spent: Seconds of it that are gone: loading, compiling, measuring.
        a_step: Seconds of a step.
    Raises:
        MethodError: Not even one does.
    """
    left = 60 * minutes * (1 - SPARE) - spent
    if left < a_step:
        raise MethodError(
            f"budget: {minutes:g} minutes are too few: {spent:.0f} s have passed before the first step, "
            f"and a step takes {a_step:.1f} s"
        )
    return int(left / a_step)


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
