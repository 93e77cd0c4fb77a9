"""What files of blocks take on the disk that a run would write to."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsekit.checkpoint import BlockState, StepStore
from sparsekit.errors import CheckpointError
from sparsekit.planning.microbench import Bench
from sparsekit.state import LinearState

DISK = 32 * 2**20  # bytes of a block's file that times the disk
FILES = 3  # files that are written, of either size


@dataclass(frozen=True, slots=True)
class Files:
    """What the file of a block takes: seconds whatever its size, and seconds a byte.

    Attributes:
        constant: Written, synced and read back.
        written: Packed, written and synced, with its digests.
        read: Read back, checked.
    """

    constant: float
    written: float
    read: float

    def seconds(self, files: int, size: int) -> float:
        """So many files of so many bytes in all, written and read once."""
        return files * self.constant + size * (self.written + self.read)


def file_seconds(bench: Bench, directory: Path) -> Files:
    """What files of blocks take where a run would write them: no time, and a note, where nothing can be written now."""
    place = next(parent for parent in [directory.absolute(), *directory.absolute().parents] if parent.is_dir())
    dtype = bench.view.dtype
    try:
        with tempfile.TemporaryDirectory(prefix=".sparsekit-", suffix=".tmp", dir=place) as made:
            store = StepStore(Path(made), dtype)
            small, large = (_file(bench, store, count) for count in (1024, DISK // dtype.itemsize))
    except (OSError, CheckpointError) as error:
        bench.notes.append(f"the time of files is not in it: {error}")
        return Files(0.0, 0.0, 0.0)
    written, read = (max(0.0, (large[i] - small[i]) / DISK) for i in range(2))
    return Files(sum(small), written, read)


def _file(bench: Bench, store: StepStore, count: int) -> tuple[float, float]:
    """Seconds to write a block of one linear, and to read it back; the fastest of a few times, as everything."""
    block = BlockState({"linear": LinearState("linear", bench.random(count // 1024, 1024, dtype=torch.float32))})
    work: tuple[Callable[[], Any], ...] = (lambda: store.commit_block(0, block, []), lambda: store.block(0))
    writing, reading = zip(*(map(bench.once, work) for _ in range(FILES)), strict=True)
    return min(writing), min(reading)
