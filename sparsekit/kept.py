"""What a run keeps to read back later: JSON with its own checksum, and checksums of tensors.

A file that was cut short or changed on the disk counts as absent, and what it held is made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHECKSUM = "checksum"


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """The value as JSON has it, with a checksum of itself."""
    plain: dict[str, Any] = json.loads(json.dumps(value, default=str))
    return {**plain, CHECKSUM: _digest(plain)}


def unsealed(path: Path) -> dict[str, Any] | None:
    """What `sealed` made of a value, read from a file; None when that is missing, damaged or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    told = value.pop(CHECKSUM, None)
    return value if told == _digest(value) else None


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def checksum(tensor: Tensor) -> int:
    """Sum of a tensor's bits as integers: finds a flipped bit and a lost block, at the speed of memory.

    No digest against an attacker: training checkpoints are as large as the optimizer and written every
    two minutes.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    wide = torch.int32 if flat.element_size() % 4 == 0 else torch.uint8
    return int(flat.view(wide).sum(dtype=torch.int64)) if flat.numel() else 0
