"""What a run keeps to read back later: JSON with its own checksum, and checksums of tensors.

A file that was cut short or changed on the disk counts as absent, and what it held is made again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

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


def sha256_file(path: Path) -> str:
    """Digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


Version = tuple[int, int, int]
TICK = 100_000_000  # nanoseconds; a file system's times are coarser than a clock's, by 4 to 10 ms on Linux


def version(path: Path) -> Version:
    """What changes when a file is written or replaced: its inode, its size, and the time of its last change."""
    about = path.stat()
    return about.st_ino, about.st_size, about.st_ctime_ns


@dataclass(frozen=True, slots=True)
class Known:
    """The digest of a file as it was at some time.

    Attributes:
        digest: sha256 of its content.
        version: Of the file, before it was read.
        at: When, in nanoseconds; a change within the tick before may not show. A tick later where there can be none.
    """

    digest: str
    version: Version
    at: int

    @classmethod
    def written(cls, path: Path, digest: str) -> Self:
        """A file that this process has just put in its place: in that tick nobody else writes to it."""
        return cls(digest, version(path), time.time_ns() + TICK)

    @classmethod
    def of(cls, path: Path) -> Self:
        """Read a file for its digest."""
        before, now = version(path), time.time_ns()
        return cls(sha256_file(path), before, now)

    def still(self, path: Path) -> bool:
        """Whether the file is that one: unchanged since, and not written to in the same tick of its clock."""
        return version(path) == self.version and self.version[2] < self.at - TICK
