"""Where a step over blocks holds what: the recipe's `model: {memory: ...}`.

No mode changes what is computed beyond rounding, so a run may go on under another one.

- `auto`, the default, holds as much on the device as a share of its free memory allows.
- `fast` holds the hidden states of all windows there, however many they are.
- `balanced` does so too, and saves elsewhere: a block's values are on the device a few rows of a linear at a time,
  linears with one input are solved one after another, factors of Gram matrices are packed into triangles,
  micro-batches are smaller, and none waits.
- `low` saves in the same way, holds the hidden states on the host, and has a block leave the device while a group is
  compressed.
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
        packed: The factor of a Gram matrix is computed and kept as a triangle.
        leaves: A block leaves the device while one of its groups is compressed.
    """

    hidden: Literal["device", "host"] | None = None
    waits: bool = True
    blocks: bool = True
    weights: int | None = None
    tokens: int | None = None
    packed: bool = False
    leaves: bool = False


HOLDINGS: dict[Memory, Holding] = {
    "auto": Holding(),
    "fast": Holding(hidden="device"),
    "balanced": Holding(hidden="device", waits=False, blocks=False, weights=2**23, tokens=8192, packed=True),
    "low": Holding("host", waits=False, blocks=False, weights=2**23, tokens=8192, packed=True, leaves=True),
}
