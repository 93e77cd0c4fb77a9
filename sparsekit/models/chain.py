"""The model as the steps so far have left it: the last state written of every block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.blockwise.walk import resident
from sparsekit.checkpoint import HOST, BlockState, StepStore, Stored
from sparsekit.errors import CheckpointError
from sparsekit.models.view import ModelView

DEVICE_SHARE = 0.6  # of the free device memory that a whole model may take; beyond it blocks are streamed


@dataclass(frozen=True, slots=True)
class Chain:
    """A model and the finished steps applied to it, in order.

    Attributes:
        view: The model.
        stores: Of the finished steps.
        trained: How many of them there are up to the last one that trained.
    """

    view: ModelView
    stores: Sequence[StepStore] = ()
    trained: int = 0

    def then(self, store: StepStore, *, trains: bool = False) -> Chain:
        """The chain after one more step."""
        return Chain(self.view, (*self.stores, store), len(self.stores) + 1 if trains else self.trained)

    def reference(self, index: int) -> BlockState:
        """A block before anything pruned it: as the last training step left it, or the model's own."""
        return Chain(self.view, self.stores[: self.trained]).block(index)

    def block(self, index: int, device: torch.device = HOST) -> BlockState:
        """State of a block: as the last step wrote it, or dense from the model's own files.

        Raises:
            CheckpointError: The step's file is gone or damaged.
        """
        return self.stored(index).on(device)

    def stored(self, index: int) -> Stored:
        """`block`, not yet made into states."""
        if not self.stores:
            return self.view.stored_block(index)
        stored = self.stores[-1].stored(index)
        if stored is None:
            raise CheckpointError(f"{self.stores[-1].block_path(index)} is missing or damaged; run the recipe again")
        return stored

    def rest(self) -> Mapping[str, Tensor]:
        """Tensors outside the blocks that a step changed, by full name."""
        changed: dict[str, Tensor] = {}
        for store in self.stores:
            changed.update(store.rest())
        return changed

    def blocks(self, device: torch.device = HOST) -> Iterator[BlockState]:
        """Every block in order."""
        return (self.block(index, device) for index in range(len(self.view.blocks)))

    @contextmanager
    def forward(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from tokens int [batch, seq_len] to logits [batch, seq_len, vocabulary].

        The whole model is held on the device when it fits; otherwise each call streams the blocks.
        """
        self.view.load_rest(self.rest())
        if not self._fits():
            yield self._streamed
            return
        self.view.materialise_all(self.blocks(self.view.device))
        try:
            yield self._whole
        finally:
            for index in range(len(self.view.blocks)):
                self.view.release(index)

    def _whole(self, tokens: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self.view.module(input_ids=tokens.to(self.view.device), use_cache=False).logits
        return logits

    def _streamed(self, tokens: Tensor) -> Tensor:
        tokens = tokens.to(self.view.device)
        with torch.inference_mode():
            hidden, calls = self.view.begin(tokens)
            for index, call in enumerate(calls):
                with resident(self.view, index, self.block(index, self.view.device)):
                    hidden = self.view.run_block(index, hidden, call)
            return self.view.logits(tokens, hidden)

    def _fits(self) -> bool:
        if self.view.device.type != "cuda":
            return True
        size = sum(row.numel for row in self.view.ledger()) * self.view.compute_dtype.itemsize
        free, _ = torch.cuda.mem_get_info(self.view.device)
        return size < DEVICE_SHARE * free
