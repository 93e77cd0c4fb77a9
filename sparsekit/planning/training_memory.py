"""How much memory a training step needs on each device; the letters are those of `memory_model`.

With several ranks every tensor of the models and of the optimizer is cut along its rows, R of them. A block
is whole on a rank while it computes, with the next one on its way; what lies outside the blocks is whole
from the forward to the end of the backward. Before the models are cut they are whole on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparsekit.models.shapes import BlockSizes, ModelSizes
from sparsekit.planning.memory_model import Moment, Part, always
from sparsekit.training.distill import chunk_rows
from sparsekit.training.schedule import MICRO_BATCH_TOKENS

SAVED_WIDTHS, SAVED_OUTPUTS = 10, 1  # see `saved_for_backward`
GATHERED = 2  # blocks of a sharded model that are whole at once: the one that computes, and the next
REDUCED = 4  # bytes a value of the gradients that ranks add up: float32
READ = {"tokens", "batch", "states", "masters", "checkpointing", "slorb"}  # of a step's parameters


def foreseen(settings: Mapping[str, Any]) -> bool:
    """Whether memory and time of a training step with these parameters are known; a plugin's may mean anything."""
    return settings.keys() >= READ


def saved_for_backward(model: ModelSizes, block: BlockSizes, tokens: int) -> int:
    """What one block keeps for its backward.

    Inputs of every group, outputs of every linear (q, k, v before and after rotation are two), both norms'
    inputs in float32 when computing in less, the activation's result: T · (10d + Σ outs + ...) · c.
    """
    outs = sum(out for out, _ in block.linears.values())
    inner = sum(into for into in block.inputs())
    return tokens * (SAVED_WIDTHS * model.width + SAVED_OUTPUTS * outs + inner) * model.computed


def branch_parameters(model: ModelSizes, settings: Mapping[str, Any]) -> int:
    """Parameters of the low-rank branches: out · in / k of a linear, and in · in / k where X is trained."""
    length = settings["slorb"]
    if length is None:
        return 0
    trained = settings["slorb_projection"] == "trained"
    shapes = [shape for block in model.blocks for shape in block.linears.values()]
    return sum((out + into * trained) * (into // length) for out, into in shapes)


def branch_saved(model: ModelSizes, block: BlockSizes, settings: Mapping[str, Any], tokens: int) -> int:
    """What the branches of a block keep for their backward: X x of every linear."""
    length = settings["slorb"]
    return 0 if length is None else tokens * sum(into // length for _, into in block.linears.values()) * model.computed


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Bytes of a training step that its moments share.

    Attributes:
        student: The student's parameters, branches included.
        teacher: The teacher's.
        ranks: Over how many devices both are cut.
        settings: The method's arguments.
        model: The student's sizes.
    """

    student: int
    teacher: int
    ranks: int
    settings: Mapping[str, Any]
    model: ModelSizes

    def cut(self, size: float) -> int:
        """A rank's share of so many bytes."""
        return round(size / self.ranks)

    def held(self) -> list[Part]:
        """What is there through the whole step."""
        model, settings, c = self.model, self.settings, self.model.computed
        sparse = sum(out * into for block in model.blocks for out, into in block.linears.values())
        plain = self.student // c - sparse
        master = 4 if settings["masters"] == "float32" else 2
        moments = 8.0 if settings["states"] == "float32" else 2 + 2 * 4 / 256
        first = 1.0 if settings["states"] == "float32" else 1 / 8
        share = "" if self.ranks == 1 else f", a {self.ranks}th of it"
        dense = master * (sparse + (plain if master != c else 0))
        return [
            *always(model),
            Part("student", f"P · c{share}", self.cut(self.student)),
            Part("teacher", f"P · c{share}", self.cut(self.teacher)),
            Part("dense weights", f"sparse P · 4, others if c differs{share}", self.cut(dense)),
            Part("moments", f"8P in float32, 2.03P in float8{share}", self.cut(self.student / c * moments)),
            Part("mask and first mask", f"sparse P · 2, or 1.125 in float8{share}", self.cut(sparse * (1 + first))),
        ]

    def gathered(self, *, backward: bool) -> list[Part]:
        """What of the cut models is whole on a rank while it computes."""
        if self.ranks == 1:
            return []
        block, c = self.model.largest.numel, self.model.computed
        gradients = block * (c + REDUCED) if backward else 0
        return [
            Part("embeddings and heads of both models", "P outside the blocks · 2c", 2 * self.model.outside * c),
            Part("blocks that are whole", "2B · c, and gradients of one", GATHERED * block * c + gradients),
        ]


def training_moments(
    model: ModelSizes,
    settings: Mapping[str, Any],
    seq_len: int,
    micro_batch: int,
    *,
    ranks: int = 1,
    teacher: ModelSizes | None = None,
) -> list[Moment]:
    """Moments of AST, on each device.

    Args:
        model: Sizes.
        settings: The method's arguments.
        seq_len: Tokens of a window.
        micro_batch: Windows of a forward.
        ranks: Devices the step is done on.
        teacher: Sizes of the teacher; None for one like the student.
    """
    c, tokens = model.computed, micro_batch * seq_len
    student = (model.numel + branch_parameters(model, settings)) * c
    taught = model if teacher is None else teacher
    sizes = _Sizes(student, taught.numel * taught.computed, ranks, settings, model)
    held, again = sizes.held(), settings["checkpointing"]
    whole = [
        saved_for_backward(model, block, tokens) + branch_saved(model, block, settings, tokens)
        for block in model.blocks
    ]
    kept = [tokens * model.width * c] * len(model.blocks) if again else whole
    activations = Part("kept for the backward", "T · (10d + outs + ins) · c a block", sum(kept))
    block = Part("one block computed again", "as kept for one", max(whole) if again else 0)
    gradients = Part("gradients", "P · c", sizes.cut(student))
    earlier = [gradients] if settings["batch"] // ranks > micro_batch else []  # of the micro-batches before
    rows = chunk_rows(tokens, model.vocabulary, torch.device("cuda" if model.cuda else "cpu"))
    each = 3 * c if model.cuda else 2 * c + 24  # student, teacher, gradient; in float32 without a kernel
    chunk = min(rows, tokens) * model.vocabulary * each
    loss = Part("logits and loss of a chunk", "chunk · V · (3c, or 2c + 24)", chunk)
    head = model.vocabulary * model.width * c
    states = (2 * model.width + taught.width) * tokens * c
    hidden = Part("hidden states, gradients of them and of the head", "3Tdc + Vdc", states + head)
    ends = Part("kept for the first block", "T · (...) · c", max(kept))
    forth, back = sizes.gathered(backward=False), sizes.gathered(backward=True)
    moments = [
        Moment("loss", [*held, *forth, *earlier, activations, hidden, loss]),
        Moment("backward", [*held, *back, *earlier, activations, hidden, block]),
        Moment("end of the backward", [*held, *back, gradients, ends, block]),
    ]
    if ranks > 1:
        models = [Part("student", "P · c", student), Part("teacher", "P · c", sizes.teacher)]
        moments.append(Moment("models whole before they are cut", [*always(model), *models]))
    return moments


def host_of_training(model: ModelSizes, process: int) -> Moment:
    """Host memory of a training step on CUDA: the chain's float32 weights, and the result's."""
    inside = model.numel - model.outside
    return Moment(
        "reading and writing the model",
        [
            Part("Python and its libraries", "measured now", process),
            Part("linears before and after in float32", "P inside · 8", 8 * inside),
            Part("one block on its way to disk", "B · (8 + 3 stored)", model.largest.numel * (8 + 3 * model.stored)),
        ],
    )


def train_micro_batch(model: ModelSizes, batch: int, seq_len: int) -> int:
    """Windows of a training forward when the recipe does not say."""
    most = max(1, min(batch, MICRO_BATCH_TOKENS["cuda" if model.cuda else "cpu"] // seq_len))
    return next(size for size in range(most, 0, -1) if batch % size == 0)
