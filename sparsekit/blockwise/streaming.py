"""Blocks on their way from and to the disk, while another one is worked on.

A thread reads the block that will be wanted next and checks its digest; another one writes the block that
was finished last. At most one block is on either way. What is promised does not change: a block counts as
finished once its file and then its record lie whole on the disk, one block after another, and a step is
done only after its last block is. An error of a thread is raised by the next call, or at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from sparsekit.checkpoint import BlockState, StepStore, Stored, block_of_tensors, block_tensors


class Ahead:
    """Reads blocks, each while the one before it is worked on.

    Args:
        read: A block by index.
        device: Where its states are to be.
        count: How many blocks there are.
    """

    def __init__(self, read: Callable[[int], Stored], device: torch.device, count: int) -> None:
        self._read, self._device, self._count = read, device, count
        self._pool = ThreadPoolExecutor(1, "sparsekit-read")
        self._next: tuple[int, Future[Stored]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __call__(self, index: int) -> BlockState:
        """A block, on the device."""
        stored = self._taken(index)
        if index + 1 < self._count:
            self._next = index + 1, self._pool.submit(self._fetched, index + 1)
        return stored.on(self._device)

    def _taken(self, index: int) -> Stored:
        """What was read ahead, once it is there; or the block, read now."""
        known, self._next = self._next, None
        return known[1].result() if known is not None and known[0] == index else self._fetched(index)

    def _fetched(self, index: int) -> Stored:
        stored = self._read(index)
        return stored.pinned() if self._device.type == "cuda" else stored


class Behind:
    """Writes blocks, each while the next one is worked on.

    Args:
        store: Where to.
    """

    def __init__(self, store: StepStore) -> None:
        self._store = store
        self._pool = ThreadPoolExecutor(1, "sparsekit-write")
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()  # what is being written is finished, also after an error
        if kind is None:
            self._settle()

    def commit(self, index: int, block: BlockState, layers: list[dict[str, Any]]) -> BlockState:
        """`StepStore.commit_block`, without waiting for the disk.

        Raises:
            CheckpointError: The block before this one could not be written.
        """
        tensors, metadata = block_tensors(block, self._store.dtype)
        host, arrived = _on_host(tensors)
        self._settle()

        def write() -> None:
            arrived()
            self._store.write_block(index, host, metadata, layers)

        self._last = self._pool.submit(write)
        return block_of_tensors(tensors, metadata)

    def _settle(self) -> None:
        """Wait until the last block is written; its error is raised here."""
        last, self._last = self._last, None
        if last is not None:
            last.result()


def _on_host(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """Tensors on their way to the host, and a function that waits until they are there."""
    devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
    host = {name: _copied(tensor) if tensor.is_cuda else tensor for name, tensor in tensors.items()}
    events = [torch.cuda.current_stream(device).record_event() for device in devices]

    def arrived() -> None:
        for event in events:
            event.synchronize()

    return host, arrived


def _copied(tensor: Tensor) -> Tensor:
    """A copy in page-locked memory that is being made."""
    target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return target.copy_(tensor, non_blocking=True)
