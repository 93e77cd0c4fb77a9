"""Quantities a recipe writes with a unit: `50M` tokens, `5%`."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def _count(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMB]?)\s*", value)
    if not match:
        raise ValueError(f"{value!r} is no count, expected a whole number or one with K, M or B, as in 50M")
    return round(float(match[1]) * _FACTORS[match[2]])


def _percent(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value)
    if not match:
        raise ValueError(f"{value!r} is no fraction, expected 0.05 or 5%")
    return float(match[1]) / 100


_COUNT_SCHEMA = {
    "anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": r"^\d+(\.\d+)?[KMB]?$"}],
    "examples": ["50M"],
}
_FRACTION_SCHEMA = {
    "anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": r"^\d+(\.\d+)?%$"}],
    "examples": ["5%"],
}

Count = Annotated[int, BeforeValidator(_count), Field(ge=1), WithJsonSchema(_COUNT_SCHEMA)]
"""A whole number, 1 or more; `50M` and `1.5B` are understood."""

Fraction = Annotated[float, BeforeValidator(_percent), Field(ge=0), WithJsonSchema(_FRACTION_SCHEMA)]
"""A fraction; `5%` is understood."""
