"""What a method of scope model is given and returns, and what its policy decides at each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsekit.state import LinearState
from sparsekit.training.update import Step
from sparsekit.training.world import ALONE, World


@dataclass(frozen=True, slots=True)
class TrainJob:
    """What a method of scope model is given.

    Attributes:
        student: The model to train, in the precision it computes in; parameters require no gradient yet.
        teacher: The dense original, or the model that the step names; frozen, in eval mode.
        linears: The linears to make sparse, by full name; their parameters are called `NAME.weight`;
            on the host.
        tokens: Training windows, int [windows, seq_len], on the host.
        valid: Held-out windows for the log, or None.
        seed: Of the order of windows.
        directory: Where checkpoints go; it is the method's own.
        log: Takes one record of the log.
        progress: Called with (tokens done, tokens in all).
        world: The processes that do this job together, each with whole models until the method shards
            them. All are given the same; `log` and `progress` of the first one count.
        another_teacher: The teacher is not the dense original; only its vocabulary is sure to be the same.
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
    another_teacher: bool = False

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

    def resize(self, steps: int) -> None:
        """Called before the first step of a run whose length was measured."""
        ...
