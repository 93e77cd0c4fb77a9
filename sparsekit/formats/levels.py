"""What a stored code stands for, as both compact formats of our own tell it in their headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sparsekit.formats.base import Setting, grid_header
from sparsekit.formats.reading import one_of, whole
from sparsekit.quant import code_range, is_odd

ODD, SIX, TERNARY, INTEGER = "odd", "six", "ternary", "integer"


def levels_header(setting: Setting) -> dict[str, Any]:
    """The bits that are stored, the levels, and the grid; odd and six levels take less than their codes have."""
    return {"bits": setting.bits - is_odd(setting.layout), "levels": setting.layout, **grid_header(setting)}


def levels_setting(config: Mapping[str, Any], stored: Mapping[str, Sequence[int]]) -> Setting:
    """Inverse of `levels_header`.

    Args:
        config: The header.
        stored: Bits that a format stores, by its levels.
    Raises:
        CheckpointError: Something else than the format has.
    """
    levels = one_of(config, "levels", tuple(stored))
    bits = one_of(config, "bits", stored[levels]) + is_odd(levels)
    symmetric = one_of(config, "symmetric", (True, False) if levels == INTEGER else (True,))
    act_order = one_of(config, "act_order", (True, False))
    return Setting(bits, whole(config, "group_size"), symmetric, act_order, levels)


def beyond_six(codes: Tensor) -> str | None:
    """Why codes of 4 bits are no six levels, odd as they may be, in words, or None."""
    lowest, highest = code_range(4, "six")
    far = bool(((codes < lowest) | (codes > highest)).any())
    return "codes are more than 5 steps from zero" if far else None
