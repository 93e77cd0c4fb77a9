"""A model as sizes: its blocks, their linears, and which of them share an input. No weight is read.

What shares an input is found as in a run, by calling a block; made-up weights do for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sparsekit.blockwise.activations import MICRO_BATCH_TOKENS
from sparsekit.models.blocks import Call
from sparsekit.models.view import ModelView

FEW = 8  # tokens a block is called with to look at its structure

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """One block.

    Attributes:
        linears: [out, in] of each linear by full name.
        groups: Names of linears that share an input, in call order.
        other: Parameters that belong to no linear's weight: norms, biases, what is out of reach.
    """

    linears: Mapping[str, Shape]
    groups: Sequence[Sequence[str]]
    other: int

    @property
    def numel(self) -> int:
        """All parameters."""
        return sum(out * into for out, into in self.linears.values()) + self.other

    def inputs(self) -> list[int]:
        """Width of the input of each group."""
        return [self.linears[group[0]][1] for group in self.groups]

    def before(self, group: int) -> float:
        """Share of the weights of all groups that a forward has passed when it reaches one of them."""
        sizes = [sum(out * into for out, into in map(self.linears.__getitem__, names)) for names in self.groups]
        return sum(sizes[:group]) / sum(sizes)


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """A model.

    Attributes:
        blocks: In order.
        outside: Parameters outside the blocks, tied ones once.
        width: Of the hidden states.
        vocabulary: Tokens the head tells apart.
        stored: Bytes of a parameter on disk.
        computed: Bytes of a parameter in forwards.
        cuda: Whether it runs on CUDA.
    """

    blocks: Sequence[BlockSizes]
    outside: int
    width: int
    vocabulary: int
    stored: int
    computed: int
    cuda: bool

    @property
    def numel(self) -> int:
        """All parameters, tied ones once."""
        return self.outside + sum(block.numel for block in self.blocks)

    @property
    def largest(self) -> BlockSizes:
        """The largest block."""
        return max(self.blocks, key=lambda block: block.numel)

    @property
    def blocks_alike(self) -> float:
        """How many blocks as large as the largest the model amounts to."""
        return sum(block.numel for block in self.blocks) / self.largest.numel

    def micro_batch(self, samples: int, seq_len: int, most: int | None = None) -> int:
        """Calibration tokens of one forward, at most so many if the recipe's memory mode says so."""
        tokens = MICRO_BATCH_TOKENS["cuda" if self.cuda else "cpu"]
        return max(1, min(samples, min(tokens, most or tokens) // seq_len)) * seq_len


def sizes_of(view: ModelView) -> ModelSizes:
    """The sizes of a model opened with `empty`; nothing stays in its blocks."""
    ledger = view.ledger()
    groups_by_kind: dict[tuple[tuple[str, Shape], ...], list[list[str]]] = {}
    blocks = []
    outside = sum(row.numel for row in ledger)
    for index, name in enumerate(view.blocks):
        linears = {full: (module.out_features, module.in_features) for full, module in view.linears(index).items()}
        kind = tuple((full.removeprefix(name), shape) for full, shape in linears.items())
        if kind not in groups_by_kind:
            found = groups_of(view, index, entering(view, 1, FEW)[index])
            groups_by_kind[kind] = [[full.removeprefix(name) for full in group] for group in found]
        held = sum(row.numel for row in ledger if row.name.startswith(f"{name}."))
        weights = sum(out * into for out, into in linears.values())
        groups = [[name + tail for tail in group] for group in groups_by_kind[kind]]
        blocks.append(BlockSizes(linears, groups, held - weights))
        outside -= held
    config = view.config.get_text_config()
    return ModelSizes(
        blocks=blocks,
        outside=outside,
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        stored=view.dtype.itemsize,
        computed=view.compute_dtype.itemsize,
        cuda=view.device.type == "cuda",
    )


def groups_of(view: ModelView, index: int, call: Call) -> list[list[str]]:
    """Linears of a block that share an input, in call order, found with weights that are all one zero.

    Args:
        view: The model; the block is on the meta device before and after.
        index: The block.
        call: What it is called with besides hidden states, for one window of `FEW` tokens.
    """
    view.pretend(index, lambda shape: torch.zeros((), dtype=view.compute_dtype, device=view.device).expand(shape))
    try:
        with torch.inference_mode():
            hidden = torch.randn(1, FEW, width_of(view), dtype=view.compute_dtype, device=view.device)
            return view.groups(index, hidden, call)
    finally:
        view.release(index)


def entering(view: ModelView, windows: int, seq_len: int) -> list[Call]:
    """What each block is called with besides hidden states; embeddings are all one zero."""
    view.pretend(None, lambda shape: torch.zeros((), dtype=view.compute_dtype, device=view.device).expand(shape))
    with torch.no_grad():
        _, calls = view.begin(torch.zeros(windows, seq_len, dtype=torch.long))
    return calls


def width_of(view: ModelView) -> int:
    """Width of the hidden states."""
    return int(view.config.get_text_config().hidden_size)
