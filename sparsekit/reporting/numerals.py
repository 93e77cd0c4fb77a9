"""How numbers are written for a reader: one definition for the terminal and the reports."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sized
from typing import Any

MANIFOLD = 10.0  # a change beyond this is written as a factor
JOINED = "\u00a0"  # between a number and its unit: no line ends there
_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


def duration(seconds: float) -> str:
    """`48.0 s`, `12 min 05 s`, `3 h 20 min`."""
    whole = round(seconds)
    if whole < 6000:
        return f"{seconds:.1f} s" if whole < 100 else f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def megabytes(count: float) -> str:
    """`5.3 MB`, of a million bytes each; less than a tenth of one in KB or bytes."""
    if 0 < count < 1e3:
        return f"{count:.0f}{JOINED}bytes"
    return f"{count / 1e3:.1f}{JOINED}KB" if 0 < count < 1e5 else f"{count / 1e6:,.1f}{JOINED}MB"


def perplexity(value: float | None) -> str:
    """Three decimals below 100, two above; `∞` and `not a number` for what is not finite."""
    if value is None or not math.isfinite(value):
        return special(value)
    if value >= 1e6:
        return f"{value:.2e}"
    return f"{value:.3f}" if value < 100 else f"{value:,.2f}"


def percent(value: float | None, decimals: int = 1) -> str:
    """`12.5 %`."""
    if value is None or not math.isfinite(value):
        return special(value)
    return f"{100 * value:.{decimals}f}{JOINED}%"


def change(value: float | None) -> str:
    """`+12.5 %`, `-0.3 %`; far more than that as `× 123`."""
    if value is None or not math.isfinite(value):
        return special(value)
    if value >= MANIFOLD:
        return f"×{JOINED}{1 + value:,.0f}"
    decimals = 2 if abs(value) < 0.01 else 1
    return f"{100 * value:+.{decimals}f}{JOINED}%".replace("-", "−")


def numbered(things: Sized, name: str) -> str:
    """`1 note`, `2 notes`."""
    return f"{len(things):,} {name}{'' if len(things) == 1 else 's'}"


def in_words(value: Any) -> str:
    """A setting: text as it is, `minutes 0.7` for a mapping, anything else as JSON."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {in_words(one)}" for key, one in value.items())
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def short(value: float) -> str:
    """Three significant digits with a suffix: `262 K`, `4.00 M`."""
    for size, suffix in _SUFFIXES:
        if abs(value) >= size * 0.9995:
            return f"{significant(value / size)}{JOINED}{suffix}"
    return f"{value:,.0f}" if float(value).is_integer() else significant(value)


def significant(value: float | None, digits: int = 3) -> str:
    """A number with so many digits that mean something: `0.0123`, `4.56e-05`."""
    if value is None or not math.isfinite(value):
        return special(value)
    if value == 0:
        return "0"
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded value: 0.9999 is 1.00
    if not -5 < exponent < 6:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def special(value: float | None) -> str:
    """What stands where no finite number can: nothing was measured, `∞`, or `not a number`."""
    if value is None:
        return "–"
    return "not a number" if math.isnan(value) else ("∞" if value > 0 else "−∞")
