"""How AST goes: λ of each step, when the mask is chosen again, and the flips it counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsekit.training.optim import SparseAdamW, Step

GAIN, MOST, FARTHEST = 0.5, 2.0, 64.0  # of the steering of λ: exponent, change at once, change in all


@dataclass(slots=True)
class AstPolicy:
    """λ of each step, and when the mask is chosen again.

    Attributes:
        optimizer: Holds weights and masks.
        steps: Steps of the run.
        decay: λ of the plateau.
        ramp: Share of the steps over which it rises.
        mask_every: Steps between choices.
        freeze: Share of the steps at the end without choices.
        hysteresis: Advantage of kept weights.
        weight_decay: Ordinary weight decay.
        flip_target: Share of entries that shall change at the highest learning rate; None to leave λ alone.
        peak: The highest learning rate.
        rounded_after: Share of the steps after which weights go on integer grids; None for never.
        factor: What λ is multiplied by to hold the target.
    """

    optimizer: SparseAdamW
    steps: int
    decay: float
    ramp: float
    mask_every: int
    freeze: float
    hysteresis: float
    weight_decay: float
    flip_target: float | None = None
    peak: float = 1.0
    rounded_after: float | None = None
    factor: float = 1.0
    refreshes: int = 0
    flips: dict[str, float] = field(default_factory=lambda: {"flip_rate": 0.0, "initial_flip_rate": 0.0})
    _latest: dict[str, Tensor] = field(default_factory=dict)
    _lr: float = 1.0

    @property
    def frozen_from(self) -> int:
        """First step of the freeze."""
        return self.steps - round(self.freeze * self.steps)

    def begin(self) -> None:
        """Called before the first step, and before one that goes on: on grids at once if they start at 0."""
        if self.rounded_after == 0:
            self.optimizer.regrid()

    def decay_at(self, step: int) -> float:
        """λ of a step counted from 0: rises linearly over the ramp, then stays; 0 in the freeze."""
        if step >= self.frozen_from:
            return 0.0
        rising = self.ramp * self.steps
        return self.factor * self.decay * (min(1.0, step / rising) if rising else 1.0)

    def resize(self, steps: int) -> None:
        """Take another length before the first step."""
        self.steps = steps

    def numbers(self, step: int, lr: float) -> Step:
        """The numbers of a step."""
        self._lr = lr
        return Step(
            number=step + 1,
            lr=lr,
            decay=self.decay_at(step),
            mix=step / max(1, self.steps),
            weight_decay=self.weight_decay,
            refresh=self._refreshes(step),
            hysteresis=self.hysteresis,
        )

    def _refreshes(self, step: int) -> bool:
        """Whether the masks are chosen again after the update of a step."""
        done = step + 1
        return done % self.mask_every == 0 and done <= self.frozen_from

    def after(self, step: int) -> dict[str, Tensor]:
        """Note what the choice of the masks changed, if it was time; returns the flip rates."""
        done, used = step + 1, self.decay_at(step)
        if self._refreshes(step):
            changed, away = self.optimizer.flips
            count = self.optimizer.sparse_numel
            self._latest = {"flip_rate": changed / count, "initial_flip_rate": away / count}
            self.refreshes += 1
            self._steer(step)
        if done == self.frozen_from:
            self.optimizer.finalize()
            if self.optimizer.fits:
                self.optimizer.regrid()  # a last time; the steps of the freeze see the grids of the result
        if self.rounded_after is not None and not self.optimizer.rounded and done >= self.rounded_after * self.steps:
            self.optimizer.regrid()
        lam = torch.tensor(used)
        return {"decay": lam, **self._rates()}

    def _steer(self, step: int) -> None:
        """Raise λ when more of the mask changed than is wanted, lower it when less did."""
        if self.flip_target is None or not self.decay_at(step):
            return
        wanted = self.flip_target * self._lr / self.peak
        ratio = (float(self._latest["flip_rate"]) / wanted) ** GAIN
        self.factor = min(FARTHEST, max(1 / FARTHEST, self.factor * min(MOST, max(1 / MOST, ratio))))

    def _rates(self) -> dict[str, Tensor]:
        return self._latest or {name: torch.tensor(value) for name, value in self.flips.items()}

    def state(self) -> dict[str, Any]:
        """What a restart needs."""
        return {
            "refreshes": self.refreshes,
            "factor": self.factor,
            "masked": self.optimizer.masked,
            "rounded": self.optimizer.rounded,
            "flips": {name: float(value) for name, value in self._rates().items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state`."""
        self.refreshes = int(state["refreshes"])
        self.factor = float(state["factor"])
        self.flips = dict(state["flips"])
        self._latest = {}
        self.optimizer.compute_with(masked=state["masked"], rounded=state["rounded"])

    def metrics(self) -> dict[str, Any]:
        """For the report."""
        return {"refreshes": self.refreshes, **{name: float(value) for name, value in self._rates().items()}}
