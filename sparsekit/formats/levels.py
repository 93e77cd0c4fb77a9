"""What a stored code stands for, as both compact formats of our own tell it in their headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsekit.formats.base import Setting, grid_header
from sparsekit.formats.reading import one_of, whole

ODD, TERNARY, INTEGER = "odd", "ternary", "integer"


def levels_header(setting: Setting) -> dict[str, Any]:
    """The bits that are stored, the levels, and the grid; odd levels take one bit less than their codes have."""
    return {"bits": setting.bits - (setting.layout == ODD), "levels": setting.layout, **grid_header(setting)}


def levels_setting(config: Mapping[str, Any], stored: Mapping[str, Sequence[int]]) -> Setting:
    """Inverse of `levels_header`.

    Args:
        config: The header.
        stored: Bits that a format stores, by its levels.
    Raises:
        CheckpointError: Something else than the format has.
    """
    levels = one_of(config, "levels", tuple(stored))
    bits = one_of(config, "bits", stored[levels]) + (levels == ODD)
    symmetric = one_of(config, "symmetric", (True, False) if levels == INTEGER else (True,))
    act_order = one_of(config, "act_order", (True, False))
    return Setting(bits, whole(config, "group_size"), symmetric, act_order, levels)
