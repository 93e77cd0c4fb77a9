"""Where a step over blocks holds what: the recipe's `model: {memory: ...}`.

No mode changes what is computed beyond rounding, so a run may go on under another one.

- `auto`, the default, holds as much on the device as a share of its free memory allows.
- `fast` holds the hidden states of all windows there, however many they are.
- `balanced` does so too, and saves elsewhere: a block's values are on the device one linear at a time, weights
  are solved a few rows at a time, linears with one input one after another, and no micro-batch waits.
- `low` saves in the same way and holds the hidden states on the host, with smaller micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Memory = Literal["auto", "fast", "balanced", "low"]


@dataclass(frozen=True, slots=True)
class Holding:
    """What one mode means.

    Attributes:
        hidden: Where the hidden states of all windows are; None lets their size decide.
        waits: Micro-batches may wait in the middle of a block while a group is compressed.
        blocks: A block's values are on the device as a whole, and linears with one input solved as one.
        weights: Of a linear that are solved at a time, where its rows do not mind; None for all.
        tokens: Of a micro-batch at most; None for what fills the device.
    """

    hidden: Literal["device", "host"] | None = None
    waits: bool = True
    blocks: bool = True
    weights: int | None = None
    tokens: int | None = None


HOLDINGS: dict[Memory, Holding] = {
    "auto": Holding(),
    "fast": Holding(hidden="device"),
    "balanced": Holding(hidden="device", waits=False, blocks=False, weights=2**23),
    "low": Holding(hidden="host", waits=False, blocks=False, weights=2**23, tokens=8192),
}
