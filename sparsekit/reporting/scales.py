"""Axes: from data to pixels, with ticks at round numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from sparsekit.reporting.numerals import special

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)  # distances of ticks that read as round
NEAR_ZERO = 0.15  # an axis whose data begin below this share of their end begins at zero
_SUFFIXES = ((1e9, "B"), (1e6, "M"), (1e3, "K"))


@dataclass(frozen=True, slots=True)
class Scale:
    """One axis.

    Attributes:
        low: Data value at the pixel `start`.
        high: Data value at the pixel `end`.
        start: Pixel.
        end: Pixel; smaller than `start` for an axis that grows upwards.
        log: Equal ratios are equally far apart; `low` and `high` are then positive.
        ticks: Values with a mark, ascending.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: tuple[float, ...]

    @classmethod
    def fit(
        cls, values: Iterable[float], start: float, end: float, *, log: bool = False, snug: bool = False, marks: int = 5
    ) -> Self:
        """A scale that holds all values.

        Args:
            values: What it must hold; values it cannot show are left out of account.
            start: Pixel of the low end.
            end: Pixel of the high end.
            log: Logarithmic.
            snug: End where the data end, not at the next tick.
            marks: About how many steps between ticks.
        """
        held = [value for value in values if shown(value, log=log)]
        low, high = (min(held), max(held)) if held else ((1.0, 10.0) if log else (0.0, 1.0))
        if low == high:
            low, high = _opened(low, log=log)
        if not log and 0 < low < NEAR_ZERO * high:
            low = 0.0
        ticks = log_ticks(low, high, marks) if log else linear_ticks(low, high, marks)
        if snug:
            ticks = [tick for tick in ticks if low <= tick <= high]
        else:
            low, high = min(low, ticks[0]), max(high, ticks[-1])
        return cls(low, high, start, end, log, tuple(ticks))

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def labels(self) -> list[str]:
        """The text at each tick."""
        return tick_labels(self.ticks)


def shown(value: float | None, *, log: bool) -> bool:
    """Whether an axis has a place for a value."""
    return value is not None and math.isfinite(value) and (value > 0 or not log)


def _opened(value: float, *, log: bool) -> tuple[float, float]:
    """Room around a single value."""
    if log:
        return value / 2, value * 2
    room = abs(value) * 0.1 or 1.0
    return value - room, value + room


def linear_ticks(low: float, high: float, marks: int = 5) -> list[float]:
    """Round values from at or below `low` to at or above `high`, about `marks` steps."""
    rough = (high - low) / marks
    if rough <= 0 or not math.isfinite(rough):
        return [low]
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in STEPS if factor * unit >= rough * 0.999)
    # a value that float32 rounded away from a tick still counts as on it
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def log_ticks(low: float, high: float, marks: int = 5) -> list[float]:
    """Powers of ten around the range, with 2 and 5 between when it is short; round values when very short."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    if high / low < 5:
        return [tick for tick in linear_ticks(low, high, marks) if tick > 0]
    if last - first > 2:
        every = max(1, math.ceil((last - first) / marks))
        return [10.0**power for power in range(first, last + every, every)]
    between = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    below = max(tick for tick in between if tick <= low * (1 + 1e-9))
    above = min((tick for tick in between if tick >= high * (1 - 1e-9)), default=10.0**last)
    return [float(f"{tick:.12g}") for tick in between if below <= tick <= above]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Labels of one axis, all in the same unit and with as few digits as tell them apart."""
    sizes = [abs(tick) for tick in ticks if tick] or [1.0]
    largest, smallest = max(sizes), min(sizes)
    if smallest < 1e-4 or largest < 1e-2:
        return [_scientific(tick) for tick in ticks]
    size, suffix = next(((s, x) for s, x in _SUFFIXES if largest >= 10 * s), (1.0, ""))
    return [_plain(tick / size) + (f" {suffix}" if suffix and tick else "") for tick in ticks]


def _plain(value: float) -> str:
    return f"{value:,.4f}".rstrip("0").rstrip(".").replace("-", "−") if math.isfinite(value) else special(value)


def _scientific(value: float) -> str:
    if value == 0:
        return "0"
    digits, exponent = f"{value:.3e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}".replace("-", "−")
