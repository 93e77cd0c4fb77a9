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
        holding: Read, made into states on the device and its weights put there, as scoring a model does: seconds a
            block, and a byte of its weights.
    """

    constant: float
    written: float
    read: float
    holding: tuple[float, float] = (0.0, 0.0)

    def seconds(self, files: int, size: int) -> float:
        """So many files of so many bytes in all, written and read once."""
        return files * self.constant + size * (self.written + self.read)

    def held(self, blocks: int, size: int) -> float:
        """A whole model of so many blocks, with so many bytes of weights in all, put on the device."""
        return blocks * self.holding[0] + size * self.holding[1]


def file_seconds(bench: Bench, directory: Path) -> Files:
    """What files of blocks take where a run would write them: no time, and a note, where nothing can be written now."""
    place = next(parent for parent in [directory.absolute(), *directory.absolute().parents] if parent.is_dir())
    dtype = bench.view.dtype
    try:
        with tempfile.TemporaryDirectory(prefix=".sparsekit-", suffix=".tmp", dir=place) as made:
            store = StepStore(Path(made), dtype)
            small, large = (_file(bench, store, size) for size in (1, DISK))
    except (OSError, CheckpointError) as error:
        bench.notes.append(f"the time of files is not in it: {error}")
        return Files(0.0, 0.0, 0.0)
    written, read, held = (max(0.0, (large[i] - small[i]) / DISK) for i in range(3))
    return Files(small[0] + small[1], written, read, (small[2], held))


def _file(bench: Bench, store: StepStore, size: int) -> tuple[float, float, float]:
    """Seconds to write a block, to read it back, and to hold it; the fastest of a few times, as everything.

    It has as many linears as the model's largest block, pruned ones, of about so many bytes and of a row at least.
    """
    view, names = bench.view, bench.sizes.largest.linears
    rows = max(1, round(size / (1024 * view.dtype.itemsize * max(1, len(names)))))
    weights = {name: bench.random(rows, 1024, dtype=torch.float32) for name in names}
    block = BlockState({name: LinearState(name, weight, mask=weight > 0) for name, weight in weights.items()})

    def held() -> None:
        stored = store.stored(0)
        for state in stored.on(view.device).linears.values() if stored else ():
            state.weight.to(view.dtype).to(view.device, view.compute_dtype, copy=True)

    work: tuple[Callable[[], Any], ...] = (lambda: store.commit_block(0, block, []), lambda: store.block(0), held)
    writing, reading, holding = zip(*(map(bench.once, work) for _ in range(FILES)), strict=True)
    return min(writing), min(reading), min(holding)
